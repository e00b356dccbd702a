"""Tests, in folders that mirror the packages; where there is no GPU, the kernels for it run in Triton's interpreter."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

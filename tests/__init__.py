"""Tests, in folders that mirror the packages. On machines without a GPU, Triton kernels run in Triton's interpreter."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # has to be set before Triton is imported

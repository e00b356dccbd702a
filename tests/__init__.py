"""Tests, in folders that mirror the packages. On machines without a GPU, Triton kernels run in Triton's interpreter."""

import os

# what libraries read when they are imported: whether to print in colours, and how to reach servers
for name in ("FORCE_COLOR", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(name, None)
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
os.environ["OMP_NUM_THREADS"] = "1"  # on tensors this small, threads cost more than they save

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # has to be set before Triton is imported

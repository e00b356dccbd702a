"""Accounting of compute and memory: FLOPs and bytes of passes, where compute goes, estimated and measured memory."""

"""Operators that read only the selected channels, rows and tokens, and fused operators for training."""

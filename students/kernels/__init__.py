"""Operators that read only what is selected, and fused ones for training."""

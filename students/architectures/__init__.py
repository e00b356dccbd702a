"""Supported architectures: records of module names, and functions that look up a model's modules and sizes."""

"""Evaluation of students against their teacher: quality, and where compute goes; one module per model family."""

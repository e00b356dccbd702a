"""Training objectives: divergence from the teacher plus the price of compute; one module per model family."""

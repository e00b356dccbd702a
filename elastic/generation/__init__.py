"""Text generation: model inputs and measured compute, one module per model family that generates text."""

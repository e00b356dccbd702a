"""Data sets: text, images, and questions about images."""

"""Text from models that generate it, family by family: what they are called with, and what it costs."""

"""Models by what they are, and how each is loaded."""

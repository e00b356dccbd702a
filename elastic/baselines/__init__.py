"""Untrained baselines on the student's frozen weights, at the student's compute."""

"""Timing of students against dense models: workloads, timed passes, and one module per model family."""

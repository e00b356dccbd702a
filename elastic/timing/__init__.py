"""What is timed, family by family."""

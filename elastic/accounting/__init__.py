"""What forward passes cost and where compute went."""

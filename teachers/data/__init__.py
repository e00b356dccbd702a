"""What teachers and students learn from."""

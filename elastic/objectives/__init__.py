"""What is minimised, family by family: the distance from the teacher, and the price of compute."""

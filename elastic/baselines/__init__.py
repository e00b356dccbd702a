"""What a student has to beat, on the same frozen weights."""

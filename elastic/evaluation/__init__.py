"""How good a student is against its teacher, and where its compute goes, family by family."""

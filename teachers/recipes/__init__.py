"""How the shipped teachers were made."""

"""Results and progress for people: all that touches rich."""

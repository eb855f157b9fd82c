"""Print results and progress; the only package that imports rich."""

"""Show what `doctor` found."""

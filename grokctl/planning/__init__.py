"""What fits which hardware, and what to choose."""

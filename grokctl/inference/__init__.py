"""Weights on devices, compiled steps, and the sequences that run through them."""

"""Grok-1 as facts and pure functions."""

"""From a magnet link to text from Grok-1, on the hardware you have."""

__version__ = "0.1.0"

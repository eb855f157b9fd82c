"""Whether the bytes are the promised ones, which are not, and what to keep of those."""

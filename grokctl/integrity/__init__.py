"""Whether files have the promised bytes: hashing, damage reports, and backups before a repair."""

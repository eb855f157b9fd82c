"""What this machine is, as values: every probe is bounded in time, and none starts JAX here."""

"""Facts about this machine: every probe has a timeout, and none starts JAX in this process."""

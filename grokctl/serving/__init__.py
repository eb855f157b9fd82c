"""The HTTP interface that other tools speak, over the engine's scheduler."""

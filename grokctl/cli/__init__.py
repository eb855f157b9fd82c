"""The command line: a file for each command, their shared options, and how a command ends."""

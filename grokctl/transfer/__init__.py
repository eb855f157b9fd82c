"""Downloading a release from its swarm and from HTTP mirrors."""

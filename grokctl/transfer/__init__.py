"""How the release arrives: from the swarm and from HTTP mirrors."""

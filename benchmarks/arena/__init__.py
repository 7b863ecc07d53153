"""Specfleet beside its peers: install them, convert one model for each, run all in turns, and say how they compare."""

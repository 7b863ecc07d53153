"""One program per peer, run by that peer's own Python: it may import the standard library, `protocol` and its peer, nothing else."""

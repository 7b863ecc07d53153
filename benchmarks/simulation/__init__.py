"""Hundreds of replicas of large models, simulated around the real policy code."""

"""Worlds whose causal truth is known: any context can be sampled, unseen combinations included."""

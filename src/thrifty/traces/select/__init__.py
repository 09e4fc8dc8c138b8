"""Selectors: a pool of chains in, the indices of those to train on out."""

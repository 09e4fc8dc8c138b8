"""Chains of thought as data: the store, the segmenter, and how chains are made, compressed, selected, perturbed."""

"""Whole pipelines of papers, straight-line over parts. Nothing imports these."""

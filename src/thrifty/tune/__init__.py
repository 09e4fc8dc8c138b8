"""Training: the supervised loop (``supervised.py``), its batches, adapters and objectives."""

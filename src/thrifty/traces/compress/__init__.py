"""Compressors: a chain in, a shorter chain out (or None: dropped). They see text, never how it was written."""

"""Requests in, traces out: engines, the meter that counts what they cost, the runner that drives strategies."""

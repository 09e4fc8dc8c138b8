"""What an answer cost and whether it was right: statistics, profiles, summaries."""

from thrifty.measure.summary import summarise

__all__ = ["summarise"]

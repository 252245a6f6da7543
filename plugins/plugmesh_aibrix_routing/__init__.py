"""Prefix-aware and load-aware routing, with rate limits per client; README.md is the card."""

__version__ = "0.1.0"

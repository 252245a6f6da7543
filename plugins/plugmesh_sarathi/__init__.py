"""Stall-free chunked prefill under a token budget (Sarathi-Serve); README.md is the card."""

__version__ = "0.1.0"

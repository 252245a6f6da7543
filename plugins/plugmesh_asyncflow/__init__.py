"""Asynchronous streaming reinforcement learning (AsyncFlow); README.md is the card."""

__version__ = "0.1.0"

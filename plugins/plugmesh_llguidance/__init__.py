"""Grammars by the llguidance library; README.md is the card."""

__version__ = "0.1.0"

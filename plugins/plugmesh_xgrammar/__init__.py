"""Grammars by the xgrammar library, without torch; README.md is the card."""

__version__ = "0.1.0"

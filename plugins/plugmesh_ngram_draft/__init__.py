"""Drafts the tokens that followed the same words earlier in the text (prompt lookup); README.md is the card."""

__version__ = "0.1.0"

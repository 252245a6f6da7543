"""Splitwise: prompt and token phases on separate pools of instances, with a mixed pool between them; README.md is the card."""

__version__ = "0.1.0"

"""Parallel thinking filtered by confidence (DeepConf); README.md is the card."""

__version__ = "0.1.0"

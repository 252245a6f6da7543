"""W4A8KV4 of QServe: two-level four-bit weights, int8 activations, four-bit KV; README.md is the card."""

__version__ = "0.1.0"

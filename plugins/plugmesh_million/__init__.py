"""KV as product-quantised codes with learned codebooks, and attention by table lookup on them (MILLION); README.md is the card."""

__version__ = "0.1.0"

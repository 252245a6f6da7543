"""Lossless bfloat16 weights in about 11 bits: Huffman codes for the exponents, the rest as it is; README.md is the card."""

__version__ = "0.1.0"

"""Early layers choose the tokens of a long prompt that the whole model reads (GemFilter); README.md is the card."""

__version__ = "0.1.0"

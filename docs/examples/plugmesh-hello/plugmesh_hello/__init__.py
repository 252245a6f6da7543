"""Says hello when a service starts its plugins, and counts what requests it has seen; README.md is the card."""

__version__ = "0.1.0"

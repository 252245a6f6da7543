"""S3-FIFO eviction for the kvstore; README.md is the card."""

__version__ = "0.1.0"

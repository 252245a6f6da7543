"""Paged KV memory: the pool of blocks and the index that finds them again by their prefix."""

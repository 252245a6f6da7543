"""Content-addressed KV blocks in tiers: a shared-memory arena, memory-mapped segments on disk, other instances."""

"""Reinforcement learning as streams: the experience table that generation, scoring and training share, and the loop that runs them."""

"""Grammars for constrained generation: what a request asks for (`spec`), and what an engine that enforces it provides (`seams`)."""

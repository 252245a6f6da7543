"""A model's own tokenizer: its files from the weightstore (`fetch`), its vocabulary (`load`), text to ids (`encode`).

What the tokenizer service serves, for services that must know how the model would write a text (grammar, decode).
"""

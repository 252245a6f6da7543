"""The decode service: KV blocks or prompts to tokens, with continuous batching.

Read in this order: `service.py` (the wire), `generate.py` (one request from admission to its last row), `prefill_remotely.py`
(the job that a prefill instance computes for it), `session.py` (rows out, one frame per step and consumer).
"""

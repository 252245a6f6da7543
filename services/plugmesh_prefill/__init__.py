"""The prefill service: prompt ids to KV blocks in the kvstore, and first tokens.

`service.py` is the wire, `take_jobs.py` the work queue, `compute.py` one job from its arrival to its last block.
"""

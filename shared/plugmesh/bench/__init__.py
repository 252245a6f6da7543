"""Measuring: seeded workloads, a cheap load generator, metrics with formulas, and the same work on other systems.

Read in this order: `workloads` (what is sent), `http_client` and `load` (how), `metrics` (what is counted), `measures` and `rounds` (the interleaved
comparison), `peers` (who is compared), `report` and `html` (how it is shown). The in-process engine runs in a child process,
`python -m plugmesh_engine.bench`; nothing here imports it.
"""

"""With and without a plugin: the same work on both sides, in turns.

Read in this order: `sides` (what the two sides load), `side` and `subject` (one side as a process, and what metrics see of it), `systems` (that process
and a whole mesh, as the bench drives them), `workloads` (the core's own), `compare` (the phases), `report` (figures with intervals), then `table`, `page`
and `leaderboard` (how it is shown), and `pairs` with `asks` (which plugins go together).
"""

"""The asynchronous loop: workers that generate, score and train over the experience table. docs/rollout-training.md describes it.

In reading order: `tasks` (what is learned), `model` and `policy` (the weights, to be trained and to generate with), `losses` and `trainer`, `synchronous` (the loop
without a table, which staleness 0 must equal), `workers` (the same as streams), `run` (all of them as processes).
"""

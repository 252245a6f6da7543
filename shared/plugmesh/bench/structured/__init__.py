"""`plugmesh bench structured`: whether constrained output is right, what it costs, and what it saves.

`suite` and `families` generate schemas, `extraction` generates tasks, `scoring` judges answers; `generation`, `extracting`, `overhead` and `jump` run
them on the real model, through a whole mesh or on one engine in a process; `report` puts the parts together, `table` and `page` show them.
"""

"""For all tests: hypothesis times nothing. How long an example takes says how busy the machine is; pytest's own timeout catches what hangs.

It does not explain failures either: for that it traces every line on Python 3.11, whose interpreter can then spin for ever
where a thread asked for the lock and thought better of it; a failing test would hang in place of being reported.

With `CI` set it draws the same examples in every run, so that a change passes or fails by what it changed. Elsewhere it draws new ones each time.
"""

import os

from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "plugmesh", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("CI")),
    phases=[phase for phase in Phase if phase is not Phase.explain],
)
settings.load_profile("plugmesh")

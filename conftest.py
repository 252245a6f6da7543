"""For all tests: hypothesis times nothing. How long an example takes says how busy the machine is; pytest's own timeout catches what hangs.

With `CI` set it draws the same examples in every run, so that a change passes or fails by what it changed. Elsewhere it draws new ones each time.
"""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "plugmesh", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("CI"))
)
settings.load_profile("plugmesh")

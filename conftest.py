"""For all tests: hypothesis times nothing. How long an example takes says how busy the machine is; pytest's own timeout catches what hangs."""

from hypothesis import HealthCheck, settings

settings.register_profile("plugmesh", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("plugmesh")

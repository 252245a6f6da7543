"""For all tests: hypothesis times nothing. How long an example takes says how busy the machine is; pytest's own timeout catches what hangs."""

from hypothesis import settings

settings.register_profile("plugmesh", deadline=None)
settings.load_profile("plugmesh")

"""Starts a mesh on this machine and keeps it running: processes, run folder, broker, readiness, clean-up.

Read `launch.py` first; `children.py` is the part that restarts what crashes.
"""

from plugmesh.supervisor.children import ChildSpec, ChildState, ChildStatus, RestartPolicy, Supervisor
from plugmesh.supervisor.runs import MeshRun, find_run, live_runs

__all__ = ["ChildSpec", "ChildState", "ChildStatus", "MeshRun", "RestartPolicy", "Supervisor", "find_run", "live_runs"]

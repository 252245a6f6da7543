"""Logs of a process whose standard error somebody captures for a while."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import io, sys
import structlog
from plugmesh import logs

log = structlog.get_logger()
real, sys.stderr = sys.stderr, io.StringIO()
logs.configure("info")
log.warning("within")
captured = sys.stderr.getvalue()
sys.stderr.close()
sys.stderr = real
log.warning("behind")
print(captured)
"""


def test_a_log_line_behind_a_capture_goes_to_the_standard_error_of_then():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert '"within"' in done.stdout and '"behind"' not in done.stdout
    assert '"behind"' in done.stderr and '"within"' not in done.stderr

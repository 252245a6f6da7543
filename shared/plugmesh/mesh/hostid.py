"""Which machine this is, for deciding whether two processes can map the same files."""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import socket


@functools.lru_cache(maxsize=8)
def _compute(override: str) -> str:
    if override:
        return override
    h = hashlib.sha256()
    for path in ("/proc/sys/kernel/random/boot_id", "/etc/machine-id"):
        try:
            h.update(pathlib.Path(path).read_bytes())
        except OSError:
            pass
    # Containers of one machine share the boot id but not the mount namespace, so they cannot map each other's files.
    for namespace in ("/proc/self/ns/mnt", "/proc/self/ns/pid"):
        try:
            h.update(os.readlink(namespace).encode())
        except OSError:
            pass
    h.update(socket.gethostname().encode())
    return h.hexdigest()[:20]


def host_id() -> str:
    """The same for processes that see the same files, different for other machines, boots and containers.

    PLUGMESH_HOST_ID overrides it: set it to one value where containers share a volume for KV and weights.
    """
    return _compute(os.environ.get("PLUGMESH_HOST_ID", ""))

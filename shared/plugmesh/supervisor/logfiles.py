"""Log files of children, kept below a cap while the children hold them open."""

from __future__ import annotations

import os
import pathlib

MAX_LOG_BYTES = 4 << 20  # per child; the same again for the previous part


def cap(path: pathlib.Path, max_bytes: int = MAX_LOG_BYTES) -> bool:
    """Moves the content to `<name>.1` and empties the file when it is over `max_bytes`.

    The writer has the file open with O_APPEND, so it goes on at the new start. Lines written between copy and truncation
    are lost; a log may lose lines where a full disk would lose the service.
    """
    try:
        if path.stat().st_size <= max_bytes:
            return False
        with path.open("rb") as source:
            source.seek(-min(max_bytes, path.stat().st_size), os.SEEK_END)
            previous = path.with_name(path.name + ".1")
            with open(os.open(previous, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as target:
                target.write(source.read(max_bytes))
        os.truncate(path, 0)
    except FileNotFoundError:
        return False
    return True


def tail(path: pathlib.Path, num_lines: int = 12, max_bytes: int = 16384) -> list[str]:
    """The last lines of a log, without empty ones; an absent file has none."""
    try:
        with path.open("rb") as f:
            f.seek(0, os.SEEK_END)
            f.seek(max(0, f.tell() - max_bytes))
            text = f.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line for line in text.splitlines() if line.strip()][-num_lines:]

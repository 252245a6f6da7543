"""Where in a TOML file a key stands, so that an error can say it. Approximate on purpose: it reads lines, tomllib reads TOML."""

from __future__ import annotations

import re
from collections.abc import Sequence

_HEADER = re.compile(r"^\s*\[\[?\s*([^\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"^\s*((?:[\w-]+|\"[^\"]*\"|'[^']*')(?:\s*\.\s*(?:[\w-]+|\"[^\"]*\"|'[^']*'))*)\s*=")


def line_of(text: str, path: Sequence[str], item: str = "") -> int:
    """Number of the line, counted from 1, that sets the key `path`, or the nearest table or inline table above it; 0 when nothing of it is there.

    Args:
        item: A string in the array that is the key's value; its own line is given where the array is spread over several.
    """
    table: list[str] = []
    best, best_depth = 0, 0
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if header := _HEADER.match(line):
            table = _parts(header[1])
            found = table
        elif key := _KEY.match(line):
            found = [*table, *_parts(key[1])]
        else:
            continue
        if list(path[: len(found)]) == found and len(found) > best_depth:
            best, best_depth = number, len(found)
            if len(found) == len(path) and item:
                best = _line_of_item(lines, number, item)
    return best


def _line_of_item(lines: Sequence[str], first: int, item: str) -> int:
    for number in range(first, len(lines) + 1):
        line = lines[number - 1]
        if f'"{item}"' in line or f"'{item}'" in line:
            return number
        if "]" in line.split("#")[0]:
            break
    return first


def _parts(dotted: str) -> list[str]:
    return [a or b or c for a, b, c in re.findall(r"\"([^\"]*)\"|'([^']*)'|([\w-]+)", dotted)]

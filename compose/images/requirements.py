"""Prints the requirements of dependency sets, from pyproject.toml: `requirements.py [EXTRA ...]` in the project's root.

The core dependencies are always among them. `build` is the build back-end's own set. The images install exactly this,
so an extra that grows a dependency grows the image, and no second list can drift.
"""

from __future__ import annotations

import pathlib
import re
import sys
import tomllib


def requirements(pyproject: pathlib.Path, extras: list[str]) -> list[str]:
    """Sorted, without duplicates. Raises KeyError for an unknown extra."""
    data = tomllib.loads(pyproject.read_text())
    if extras == ["build"]:
        return sorted(data["build-system"]["requires"])
    project = data["project"]
    found = set(project["dependencies"])
    todo, seen = list(extras), set()
    while todo:
        extra = todo.pop()
        if extra in seen:
            continue
        seen.add(extra)
        for requirement in project["optional-dependencies"][extra]:
            own = re.fullmatch(rf"{re.escape(project['name'])}\[([^\]]*)\]", requirement)
            if own:
                todo += [name.strip() for name in own.group(1).split(",")]
            else:
                found.add(requirement)
    return sorted(found)


if __name__ == "__main__":
    print("\n".join(requirements(pathlib.Path("pyproject.toml"), sys.argv[1:])))

"""Prints the requirements of dependency sets, from pyproject.toml: `requirements.py [--alone] [EXTRA ...]` in the project's root; with
`--alone` those that are installed without their own requirements.

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


# Their own requirements are not installed: xgrammar asks for torch, transformers and triton, and plugmesh loads its C++ library alone.
# What that needs is in the extra by name.
ALONE = ("xgrammar",)


def is_alone(requirement: str) -> bool:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0] in ALONE


if __name__ == "__main__":
    alone = "--alone" in sys.argv
    extras = [argument for argument in sys.argv[1:] if argument != "--alone"]
    print("\n".join(line for line in requirements(pathlib.Path("pyproject.toml"), extras) if is_alone(line) == alone))

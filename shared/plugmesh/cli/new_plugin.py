"""`plugmesh new-plugin`: writes the files and says what to do next."""

from __future__ import annotations

import pathlib

from plugmesh import scaffold
from plugmesh.cli import output


def run_new_plugin(slug: str, *, kind: str, out: pathlib.Path | None, distribution: bool | None) -> None:
    """Raises ConfigError when the name, the kind or the place cannot be used."""
    place, is_own = scaffold.default_place(pathlib.Path.cwd())
    if out is not None:
        place, is_own = out, False
    if distribution is not None:
        is_own = distribution
    files = scaffold.make(slug, kind, place, is_distribution=is_own)
    for path in files:
        output.out.print(f"  {path}", soft_wrap=True)
    test = next(p for p in files if p.name.startswith("test_"))
    page = next(p for p in files if p.name == "README.md")
    output.out.print(f"\ntest it:      python -m pytest {test}", soft_wrap=True)
    if is_own:
        output.out.print(f"install it:   pip install --no-deps -e {files[0].parents[1]}", soft_wrap=True)
    output.out.print(f"show it:      plugmesh plugins {slug}", soft_wrap=True)
    output.out.print(f"measure it:   plugmesh ab {slug}", soft_wrap=True)
    output.out.print(f"then say in   {page}   what it does, and in plugin.toml what the card states; docs/plugins/authoring.md has the whole way", soft_wrap=True)

"""`plugmesh new-plugin`: a working plugin of a kind, with a card, a page and tests that pass, to be changed into something of use.

Each folder of `templates/` is a kind. Its files are the plugin's with "${...}" for names and ".txt" behind, so that no tool takes them for code.
"""

from __future__ import annotations

import pathlib
import re
import string

from plugmesh.errors import ConfigError

TEMPLATES = pathlib.Path(__file__).resolve().parent / "templates"
_COMMON = "common"


def kinds() -> list[str]:
    """What can be made: "scheduler", "kv-codec", ..."""
    return sorted(p.name for p in TEMPLATES.iterdir() if p.is_dir() and p.name != _COMMON and not p.name.startswith("_"))


def make(slug: str, kind: str, out: pathlib.Path, *, is_distribution: bool = False) -> list[pathlib.Path]:
    """Writes `out`/plugmesh_<slug>, or a distribution of its own with that package and a pyproject.toml in `out`/plugmesh-<slug>.

    Returns:
        The files, in the order in which they are worth reading.

    Raises:
        ConfigError: Not a slug, no such kind, or the folder exists already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]{1,40}", slug) or slug.endswith("_"):
        raise ConfigError(f"{slug!r} cannot be a plugin's name: small letters, digits and underscores, a letter first, two at least")
    if kind not in kinds():
        raise ConfigError(f"there is no kind {kind!r}; known: {', '.join(kinds())}")
    folder = out / f"plugmesh-{slug.replace('_', '-')}" if is_distribution else out / f"plugmesh_{slug}"
    if folder.exists():
        raise ConfigError(f"{folder} exists already; another slug, or --out with another folder")
    package = folder / f"plugmesh_{slug}" if is_distribution else folder
    words = {
        "slug": slug,
        "package": f"plugmesh_{slug}",
        "distribution": f"plugmesh-{slug.replace('_', '-')}",
        "Class": "".join(w.capitalize() for w in slug.split("_")),
    }
    written = []
    for source in [*sorted((TEMPLATES / kind).iterdir(), key=_reading_order), *sorted((TEMPLATES / _COMMON).iterdir())]:
        name = source.name.removesuffix(".txt")
        if (name == "pyproject.toml" and not is_distribution) or source.suffix != ".txt":
            continue
        target = folder / name if name == "pyproject.toml" else package / "tests" / f"test_{slug}.py" if name == "test.py" else package / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(string.Template(source.read_text()).substitute(words))
        written.append(target)
    _write_facts(package)
    return written


def default_place(start: pathlib.Path) -> tuple[pathlib.Path, bool]:
    """Where a new plugin goes when nobody says: plugins/ of the checkout that `start` is in, else a distribution of its own right here."""
    for folder in (start, *start.parents):
        if (folder / "plugins").is_dir() and (folder / "shared" / "plugmesh").is_dir():
            return folder / "plugins", False
    return start, True


def _reading_order(path: pathlib.Path) -> tuple[int, str]:
    order = ["plugin.py.txt", "plugin.toml.txt", "README.md.txt", "test.py.txt"]
    return (order.index(path.name) if path.name in order else -1, path.name)


def _write_facts(package: pathlib.Path) -> None:
    import tomllib

    from plugmesh import card_facts
    from plugmesh.cards import Card

    page = package / "README.md"
    card = Card.model_validate(tomllib.loads((package / "plugin.toml").read_text()))
    page.write_text(card_facts.updated(page.read_text(), card))

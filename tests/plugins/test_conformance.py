"""Every plugin in the tree, and the out-of-tree example, against the suites of what its card says it registers."""

from __future__ import annotations

import ast
import pathlib
import sys

import pytest

from plugmesh import cards
from plugmesh.testing.conformance import CardConformance, RecordConformance, suites

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "plugmesh-hello"
if EXAMPLE.is_dir() and str(EXAMPLE) not in sys.path:
    sys.path.append(str(EXAMPLE))  # as if it were installed; tests/plugins/test_hello.py installs it for real
SLUGS = sorted(cards.installed())
SUITES = suites()


def own_suites(slug: str) -> set[str]:
    """Names of the suites that a plugin's own tests subclass, with settings of their own perhaps."""
    folder = pathlib.Path(next(iter(__import__(cards.package_of(slug)).__path__))) / "tests"
    found = set()
    for path in folder.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found |= {ast.unparse(base).split(".")[-1] for base in node.bases}
    return found


def _bind() -> None:
    for slug in SLUGS:
        bases: list[type] = [CardConformance]
        bases += [SUITES[hook] for hook in cards.read(slug).hooks if hook in SUITES]
        own = own_suites(slug)
        for base in bases:
            if base.__name__ not in own:
                name = f"Test_{slug}_{base.__name__.removesuffix('Conformance')}"
                globals()[name] = type(name, (base,), {"slug": slug, "__doc__": f"{slug}: {base.__name__}"})


_bind()


def test_plugins_were_found() -> None:
    """All that lie in the tree, whichever they are, and the example."""
    assert {p.parent.name.removeprefix("plugmesh_") for p in (ROOT / "plugins").glob("plugmesh_*/plugin.toml")} | {"hello"} <= set(SLUGS)


@pytest.mark.parametrize("slug", SLUGS)
def test_each_suite_of_a_plugin_runs_here_or_among_its_own_tests(slug: str) -> None:
    bound = {base.__name__ for name, c in globals().items() if name.startswith(f"Test_{slug}_") for base in c.__bases__}
    wanted = {"CardConformance"} | {SUITES[h].__name__ for h in cards.read(slug).hooks if h in SUITES}

    assert wanted - bound - own_suites(slug) == set()


@pytest.mark.parametrize("slug", SLUGS)
def test_every_kind_of_record_that_a_plugin_registers_has_a_suite(slug: str) -> None:
    assert [h for h in cards.read(slug).hooks if h.startswith("register_") and h not in SUITES] == []


def test_the_suites_are_bases_that_pytest_does_not_collect_by_themselves() -> None:
    assert len(SUITES) >= 5
    assert all(issubclass(s, RecordConformance) and not s.__name__.startswith("Test") for s in SUITES.values())

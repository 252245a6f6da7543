"""docs/operations.md and README.md say what the code has: metrics, keys, commands, files."""

from __future__ import annotations

import ast
import pathlib
import re
import tomllib

import pytest

from plugmesh import config

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/operations.md").read_text()
README = (ROOT / "README.md").read_text()


def defined_metrics() -> dict[str, str]:
    """Metric name (with prefix) to the file that makes it, for every literal first argument of `.counter(`, `.gauge(`, `.histogram(` and of metric families and `GapHistogram`."""
    found: dict[str, str] = {}
    for root in ("shared", "services", "plugins"):
        for path in (ROOT / root).rglob("*.py"):
            if "tests" in path.parts or "testing" in path.parts:
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                match node:
                    case ast.Call(func=ast.Attribute(attr="counter" | "gauge" | "histogram"), args=[ast.Constant(value=str(name)), *_]):
                        found[f"plugmesh_{name}"] = str(path.relative_to(ROOT))
                    case ast.Call(func=ast.Name(id="GaugeMetricFamily" | "CounterMetricFamily" | "GapHistogram" as kind), args=[ast.Constant(value=str(name)), *_]):
                        found[name + ("_total" if kind.startswith("Counter") else "")] = str(path.relative_to(ROOT))
    return found


def documented_metrics() -> set[str]:
    rows = [line for line in PAGE.splitlines() if line.startswith("| `plugmesh_")]
    return {name for row in rows for name in re.findall(r"`(plugmesh_\w+)(?:\{[^}`]*\})?`", row.split("|")[1])}


def test_every_metric_is_documented_and_every_documented_one_exists() -> None:
    defined, documented = defined_metrics(), documented_metrics()
    assert len(defined) > 40

    assert {n: f for n, f in defined.items() if n not in documented} == {}
    assert documented - set(defined) == set()


def test_every_key_of_the_mesh_table_is_documented_with_its_default() -> None:
    table = PAGE.split("### `[mesh]`")[1].split("###")[0]
    for name, field in config.MeshSettings.model_fields.items():
        assert re.search(rf"`{name}[`.]", table), f"mesh.{name}"
        if isinstance(field.default, str | int | float) and field.default != "":
            row = next(line for line in table.splitlines() if line.startswith(f"| `{name}`"))
            assert f"{field.default:g}" in row if isinstance(field.default, float) else str(field.default) in row, row
    shared = PAGE.split("every service\n")[1].split("\n\n")[0]
    for name in config.ServiceSettings.model_fields:
        assert f"`{name}`" in shared, name


def test_the_example_configuration_is_valid(tmp_path: pathlib.Path) -> None:
    example = re.search(r"```toml\n(.*?)```", PAGE, re.S)
    assert example is not None
    path = tmp_path / "mesh.toml"
    path.write_text(example[1])

    assert config.load(path, environ={}).plugin_slugs("decode") == ["sarathi"]
    assert tomllib.loads(re.search(r"```toml\n(.*?)```", README, re.S)[1].replace("\n  ", "\n")) != {}  # type: ignore[index]


def test_every_service_key_that_the_page_names_exists() -> None:
    import importlib

    for service, key in re.findall(r"`services\.(\w+)\.(\w+)`", PAGE):
        settings = importlib.import_module(f"plugmesh_{service}.config").Settings
        assert key in settings.model_fields, f"services.{service}.{key}"


def test_every_command_in_the_readme_exists_and_the_other_way_round() -> None:
    from plugmesh.cli.app import app, keys_app

    commands = {c.name or c.callback.__name__ for c in app.registered_commands} - {"version"} | {f"keys {c.name}" for c in keys_app.registered_commands}  # type: ignore[union-attr]
    commands |= {str(group.name) for group in app.registered_groups} - {"keys"}  # one row for a group, but for keys
    named = {m for row in README.splitlines() if row.startswith("| `plugmesh ") for m in re.findall(r"plugmesh (keys \w+|[\w-]+)", row)}

    assert named == commands


@pytest.mark.parametrize("page", ["README.md", "docs/operations.md"])
def test_links_and_files_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    files = re.findall(r"`((?:scripts|services|shared|plugins|docs|protos)/[\w./]+)`", text)

    assert links or files
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []
    assert [f for f in files if not (ROOT / f.rstrip("/")).exists()] == []


def test_the_readme_asks_for_the_two_commands_only() -> None:
    assert "./scripts/run" in README
    assert "./scripts/test" in README
    assert not re.search(r"\bpip3? install\b|\bapt(-get)? install\b", README)

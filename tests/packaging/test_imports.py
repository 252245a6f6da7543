"""Imports go down only, nothing that arrives is unpickled, and light services stay light: read from every source file."""

from __future__ import annotations

import ast
import functools
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / d) for d in ("shared", "services", "plugins"))}
SERVICES = sorted(p.name for p in (ROOT / "services").glob("plugmesh_*") if (p / "__init__.py").exists())
PLUGINS = sorted(p.name for p in (ROOT / "plugins").glob("plugmesh_*") if (p / "__init__.py").exists())

# Lower number, lower layer; a module may import modules of its own layer and of lower ones. The longest prefix counts.
LAYERS = {
    "plugmesh_proto": 0,
    "plugmesh": 0,                    # __init__: docstring and version
    "plugmesh.types": 0,
    "plugmesh.errors": 0,
    "plugmesh.records": 0,
    "plugmesh.wire": 0,
    "plugmesh.limits": 0,
    "plugmesh.detokenize": 0,
    "plugmesh.config": 0,
    "plugmesh.config_lines": 0,
    "plugmesh.watchdog": 0,
    "plugmesh.logs": 0,
    "plugmesh.metrics": 0,
    "plugmesh.models": 0,
    "plugmesh.hookspecs": 1,
    "plugmesh.cards": 1,
    "plugmesh.card_facts": 1,
    "plugmesh.docs": 1,
    "plugmesh.host": 2,
    "plugmesh.mesh": 3,
    "plugmesh.kv": 3,
    "plugmesh.client": 3,
    "plugmesh.tokenization": 4,
    "plugmesh.grammar": 4,
    "plugmesh.grammar.spec": 0,
    "plugmesh.grammar.seams": 0,
    "plugmesh_kernels": 4,
    "plugmesh_engine": 5,
    "plugmesh.supervisor": 6,
    "plugmesh.bench": 7,
    "plugmesh.quality": 6,
    "plugmesh.ab": 7,
    "plugmesh.cli": 7,
    "plugmesh.scaffold": 7,
    "plugmesh.testing": 7,
    **{name: 10 for name in (*SERVICES, *PLUGINS)},
}
TORCH_FREE = ("plugmesh.", "plugmesh_gateway", "plugmesh_tokenizer", "plugmesh_kvstore", "plugmesh_weightstore")


def sources(*, tests: bool = False) -> list[pathlib.Path]:
    found = [p for root in ("shared", "services", "plugins") for p in sorted((ROOT / root).rglob("*.py"))]
    return [p for p in found if p.parts[len(ROOT.parts) + 1] != "plugmesh_proto" and (tests or "tests" not in p.parts)]


def module_of(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> tuple[str, int] | None:
    """The entry of LAYERS that a module belongs to; None for other people's modules."""
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        if prefix in LAYERS:
            return prefix, LAYERS[prefix]
    return None


def type_checking_only(tree: ast.Module) -> set[ast.AST]:
    """Nodes below `if TYPE_CHECKING:`; they import nothing when the program runs."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            found.update(child for statement in node.body for child in ast.walk(statement))
    return found


@functools.cache
def imports_of(path: pathlib.Path) -> list[tuple[str, int]]:
    """(imported module, line) for every import statement, also those within functions. `from a import b` counts as a.b
    when that is a module here, else as a."""
    tree = ast.parse(path.read_text(), str(path))
    skipped = type_checking_only(tree)
    package = module_of(path).split(".") if path.name == "__init__.py" else module_of(path).split(".")[:-1]
    found = []
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])]) if node.level else node.module
            found += [(f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules() else base, node.lineno) for alias in node.names]
    return found


@functools.cache
def modules() -> frozenset[str]:
    names = {module_of(p) for p in sources()}
    return frozenset(names | {".".join(n.split(".")[:i]) for n in names for i in range(1, n.count(".") + 1)})


def violations(module: str, imported: list[tuple[str, int]]) -> list[str]:
    own = layer_of(module)
    assert own is not None, f"{module} is in no layer: add it to LAYERS"
    found = []
    for target, line in imported:
        other = layer_of(target)
        if other is None or other[0] == own[0]:
            continue
        top = target.split(".")[0]
        if other[1] > own[1]:
            found.append(f"{module}:{line} imports {target}, which is above it")
        elif own[0] in (*SERVICES, *PLUGINS) and top in (*SERVICES, *PLUGINS):
            found.append(f"{module}:{line} imports {target}: services and plugins never import each other")
        elif own[0] in PLUGINS and any(part.startswith("_") for part in target.split(".")[1:]):
            found.append(f"{module}:{line} imports {target}, which is private")
    return found


def test_imports_go_down_only() -> None:
    files = sources()
    assert len(files) > 30

    assert [v for path in files for v in violations(module_of(path), imports_of(path))] == []


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("plugmesh.types", "plugmesh.host"),
        ("plugmesh.mesh.rpc", "plugmesh_engine"),
        ("plugmesh.mesh", "plugmesh.cli"),
        (SERVICES[0], SERVICES[-1] + ".service"),
        ("plugmesh_engine.engine", SERVICES[0]),
        ("plugmesh_kernels.pack", "plugmesh_engine.weights"),
        ("plugmesh_kernels", "plugmesh_weightstore.pack"),
    ],
)
def test_the_check_sees_an_import_that_goes_up_or_across(module: str, target: str) -> None:
    assert len(violations(module, [(target, 1)])) == 1


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_has_its_three_doors(service: str) -> None:
    folder = ROOT / "services" / service

    assert [n for n in ("__main__.py", "config.py", "service.py") if not (folder / n).is_file()] == []


def test_the_engine_knows_no_wire_but_where_it_fetches_weights() -> None:
    """A scheduler, a sampler or a kernel that needs protobuf or NATS could not be tested or reused without a mesh."""
    engine = [p for p in sources() if module_of(p).startswith(("plugmesh_engine", "plugmesh_kernels")) and p.stem != "fetch"]
    found = [f"{module_of(p)}:{line}" for p in engine for target, line in imports_of(p) if target.startswith(("plugmesh_proto", "nats"))]

    assert len(engine) > 5
    assert found == []


def calls_of(path: pathlib.Path) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(n.func), n) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]


UNSAFE_MODULES = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
UNSAFE_CALLS = ("torch.load", "torch.jit.load", "torch.hub.load", "numpy.load", "np.load", "eval", "exec")


def unsafe_uses(path: pathlib.Path) -> list[str]:
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    found = [f"{name}:{line} imports {m}" for m, line in imports_of(path) if m.split(".")[0] in UNSAFE_MODULES] if path.is_relative_to(ROOT) else []
    for called, node in calls_of(path):
        safe_numpy = called.endswith("np.load") or called == "numpy.load"
        if called in UNSAFE_CALLS and not (safe_numpy and any(k.arg == "allow_pickle" and ast.unparse(k.value) == "False" for k in node.keywords)):
            found.append(f"{name}:{node.lineno} calls {called}")
        if any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords):
            found.append(f"{name}:{node.lineno} allows pickle")
        if called.split(".")[-1] in ("load", "load_all") and called.startswith("yaml"):
            found.append(f"{name}:{node.lineno} calls {called}; use safe_load")
    return found


def test_nothing_that_arrives_is_unpickled_or_evaluated() -> None:
    assert [use for path in sources() for use in unsafe_uses(path)] == []


@pytest.mark.parametrize("line", ["torch.load('x')", "np.load(p)", "np.load(p, allow_pickle=True)", "eval(text)", "yaml.load(f)"])
def test_the_check_sees_an_unsafe_call(tmp_path: pathlib.Path, line: str) -> None:
    path = tmp_path / "x.py"
    path.write_text(line)

    assert unsafe_uses(path) != []


@pytest.mark.parametrize("package", ["plugmesh.mesh", "plugmesh.cli.app", *[s for s in SERVICES if s.startswith(TORCH_FREE)]])
def test_what_must_not_need_torch_does_not_import_it(package: str) -> None:
    """Imports every module of a package in a fresh interpreter in which torch cannot be imported."""
    names = sorted(m for m in modules() if (m == package or m.startswith(package + ".")) and not m.endswith("__main__") and ".migrations." not in m)
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'triton'):\n"
        "            raise ImportError('torch is not wanted here')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        f"for name in {names!r}:\n"
        "    __import__(name)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=ENV)

    assert names, f"no modules found for {package}"
    assert (done.returncode, done.stderr[-2000:]) == (0, "")


def test_the_command_line_starts_fast_because_it_imports_little() -> None:
    code = "import sys, plugmesh.cli, plugmesh.cli.app; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout.split()

    assert {"grpc", "nats", "torch", "sqlalchemy", "fastapi", "numpy"}.isdisjoint(loaded)

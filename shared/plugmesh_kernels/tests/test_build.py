"""The extension is compiled, found, chosen and, where it cannot be, its absence explained."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import pytest

import plugmesh_kernels
from plugmesh_kernels import build

SHARED = build.PACKAGE.parent
TINY = """
#include <pybind11/pybind11.h>
#include <stdexcept>
#include "word.h"
static std::string chosen = WORD;
PYBIND11_MODULE(_native, m) {
  m.def("isa", [] { return chosen; });
  m.def("select_isa", [](const std::string& name) {
    if (name == "avx512") throw std::invalid_argument("not on this processor");
    chosen = name;
  });
}
"""
can_compile = pytest.mark.skipif(
    build.find_compiler() is None or not (pathlib.Path(sysconfig.get_path("include")) / "Python.h").is_file(), reason="no C++ compiler or no Python.h"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A module with the doors of the real one, compiled in seconds; in folders csrc, objects, out."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "csrc").mkdir()
    (folder / "csrc" / "module.cpp").write_text(TINY)
    (folder / "csrc" / "word.h").write_text('#pragma once\n#include <string>\n#define WORD "portable"\n')
    build.build(folder / "out", sources=folder / "csrc", objects=folder / "objects")
    return folder


def ask(expression: str, **env: str) -> str:
    """What an expression about `k`, the package, prints in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", f"import plugmesh_kernels as k\nprint({expression})"], capture_output=True, text=True, timeout=60,
        env={**{n: v for n, v in os.environ.items() if not n.startswith("PLUGMESH_KERNELS")}, "PYTHONPATH": str(SHARED), **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@can_compile
def test_where_there_is_a_compiler_there_are_kernels() -> None:
    """A source that no longer compiles must not become a silent fall-back to torch."""
    if "PLUGMESH_KERNELS_ISA" in os.environ or "PLUGMESH_KERNELS_LIB" in os.environ:
        pytest.skip("another build was asked for")
    assert plugmesh_kernels.available(), plugmesh_kernels.why_not()
    assert plugmesh_kernels.isa() in plugmesh_kernels.ISAS
    assert plugmesh_kernels.library().parent == build.PACKAGE
    assert not plugmesh_kernels.is_stale(), "python -m plugmesh_kernels.build"


@can_compile
def test_each_supported_instruction_set_can_be_chosen() -> None:
    assert plugmesh_kernels.available(), plugmesh_kernels.why_not()
    for isa in plugmesh_kernels.ISAS:
        if plugmesh_kernels.native().supports(isa):
            assert ask("k.isa()", PLUGMESH_KERNELS_ISA=isa) == isa
        else:
            assert isa in ask("k.why_not()", PLUGMESH_KERNELS_ISA=isa)


@can_compile
def test_another_build_can_be_loaded_and_its_age_is_seen(tiny: pathlib.Path) -> None:
    library = str(tiny / "out" / build.module_file_name())

    assert ask("k.isa(), k.library(), k.is_stale()", PLUGMESH_KERNELS_LIB=library) == f"portable {library} True"
    assert ask("k.isa()", PLUGMESH_KERNELS_LIB=library, PLUGMESH_KERNELS_ISA="avx2") == "avx2"


@can_compile
def test_what_a_built_file_came_from_can_be_read_without_loading_it(tiny: pathlib.Path, tmp_path: pathlib.Path) -> None:
    library = tiny / "out" / build.module_file_name()
    changed = shutil.copytree(tiny / "csrc", tmp_path / "csrc")
    assert build.built_key(library) == build.sources_key(tiny / "csrc") == build.sources_key(changed)

    (changed / "word.h").write_text((changed / "word.h").read_text() + "\n")

    assert build.sources_key(changed) != build.built_key(library)
    assert build.built_key(pathlib.Path(sys.executable).resolve()) == ""


@can_compile
def test_only_what_changed_is_compiled_again(tiny: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    run = build._run
    monkeypatch.setattr(build, "_run", lambda command: (commands.append(list(command)), run(command)))

    build.build(tiny / "again", sources=tiny / "csrc", objects=tiny / "objects")

    assert ["-c" in c for c in commands] == [False]  # it was only linked
    (tiny / "csrc" / "word.h").write_text('#pragma once\n#include <string>\n#define WORD 5\n')
    with pytest.raises(build.BuildError, match=r"module\.cpp"):  # a header counts as well, and this one is wrong
        build.build(tiny / "again", sources=tiny / "csrc", objects=tiny / "objects")
    assert ask("k.isa()", PLUGMESH_KERNELS_LIB=str(tiny / "again" / build.module_file_name())) == "portable"  # a failure leaves the old file


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"PLUGMESH_KERNELS_ISA": "none"}, "PLUGMESH_KERNELS_ISA=none"),
        ({"PLUGMESH_KERNELS_ISA": "sse9"}, "'sse9' is none of avx512, avx2, portable"),
        ({"PLUGMESH_KERNELS_LIB": "/nowhere/x.so"}, "/nowhere/x.so cannot be loaded"),
    ],
)
def test_why_kernels_cannot_be_used_is_told(variables: dict[str, str], reason: str) -> None:
    assert reason in ask("k.why_not()", **variables)
    assert ask("k.available()", **variables) == "False"


def test_without_kernels_the_module_is_refused_with_the_reason(tmp_path: pathlib.Path) -> None:
    """A package as it is after an installation without a compiler."""
    shutil.copytree(build.PACKAGE, tmp_path / "plugmesh_kernels", ignore=shutil.ignore_patterns("*.so", "tests", "__pycache__"))

    said = ask("k.why_not() if not k.available() else k.library()", PYTHONPATH=str(tmp_path))

    assert said == "not compiled for this Python; `python -m plugmesh_kernels.build` compiles them or says what is missing"
    code = "try: k.native()\nexcept k.KernelsUnavailable as e: print(isinstance(e, ImportError), e)"
    done = subprocess.run([sys.executable, "-c", f"import plugmesh_kernels as k\n{code}"], env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.stdout.startswith("True not compiled for this Python"), done.stderr


def test_a_machine_without_a_compiler_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)

    assert build.main(["--out", str(tmp_path)]) == 1
    assert "apt install g++" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []

"""A plugin's C++ is compiled once, found again, and called; its absence and its mistakes are explained."""

from __future__ import annotations

import ctypes
import pathlib
import threading

import numpy as np
import pytest

import plugmesh_kernels
from plugmesh_kernels import build, jit

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")

SOURCE = """
#include "factor.h"
extern "C" int twice(int x) { return FACTOR * x; }
extern "C" void linear(void* context, const float* x, int t, int k, float* y, int n) {
  const float scale = *static_cast<const float*>(context);
  for (int r = 0; r < t; ++r)
    for (int i = 0; i < n; ++i) y[r * n + i] = scale * x[r * k];
}
"""


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    where = tmp_path / "plugmesh_some" / "csrc"
    where.mkdir(parents=True)
    (where / "some.cpp").write_text(SOURCE)
    (where / "factor.h").write_text("#define FACTOR 2\n")
    return where


def test_sources_are_compiled_once_and_again_when_a_header_or_a_flag_changes(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    cache = tmp_path / "cache"
    threads = [threading.Thread(target=jit.load, args=(folder,), kwargs={"cache": cache}) for _ in range(3)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    (first,) = cache.iterdir()
    stamp = first.stat().st_mtime_ns

    assert jit.load(folder, cache=cache).twice(21) == 42
    assert [first] == list(cache.iterdir()) and stamp == first.stat().st_mtime_ns

    (folder / "factor.h").write_text("#define FACTOR 3\n")

    assert jit.load(folder, cache=cache).twice(21) == 63
    jit.load(folder, flags=["-O0"], cache=cache)
    assert len(list(cache.iterdir())) == 3


def test_a_mistake_in_the_sources_is_the_compilers_message_and_leaves_nothing(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (folder / "some.cpp").write_text("int broken( {")
    with pytest.raises(jit.BuildError, match=r"some\.cpp:1"):
        jit.load(folder, cache=tmp_path / "cache")

    assert list((tmp_path / "cache").iterdir()) == []


def test_a_machine_without_a_compiler_says_so(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(jit.NoCompiler, match="apt install"):
        jit.load(folder)


def test_a_capsule_is_what_the_executor_takes(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    library = jit.load(folder, cache=tmp_path / "cache")
    scale = np.array([3.0], np.float32)
    made = jit.capsule(library.linear, "plugmesh.linear.v1", scale.ctypes.data)
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]

    assert get(made, b"plugmesh.linear.v1") == ctypes.cast(library.linear, ctypes.c_void_p).value
    if plugmesh_kernels.available():
        plugmesh_kernels.native().Linear.foreign(4, 4, made)  # checks the name
    with pytest.raises(ValueError, match="no capsule is named"):
        jit.capsule(library.linear, "plugmesh.linear.v9")

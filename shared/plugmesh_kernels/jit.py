"""Native code of plugins: compiled from a folder of C++ on first use, kept in a cache, called through ctypes and capsules.

A plugin's sources take plain pointers and are `extern "C"`, so that they need neither Python's headers nor a build step of the distribution. They are
compiled for the very processor that runs them (`-march=native`), so a library is never taken to another machine: the cache's key holds the processor.
Every plugin needs a way on without it, since `NoCompiler` is an ordinary answer:

    try:
        library = jit.load(pathlib.Path(__file__).parent / "csrc")
    except jit.NoCompiler:
        library = None  # numpy
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

from plugmesh_kernels import build

FLAGS = (
    "-O3", "-std=c++17", "-march=native", "-fPIC", "-pthread",
    "-Wall", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-fno-math-errno",
)  # fmt: skip
CAPSULES = ("plugmesh.linear.v1", "plugmesh.linear.v2", "plugmesh.layer.v1", "plugmesh.attention.v2", "plugmesh.embedding.v1", "plugmesh.matcher.v1")
"""Names that the kernels know; `csrc/bind_executor.cpp` says what the functions look like, for the last one `csrc/matching.h`."""

BuildError = build.BuildError
"""The compiler refused; its message is the text."""


class NoCompiler(BuildError):
    """There is no C++ compiler here."""


def load(folder: pathlib.Path, *, flags: Sequence[str] = (), cache: pathlib.Path | None = None) -> ctypes.CDLL:
    """The library of all `*.cpp` in a folder, compiled unless these sources were compiled here before.

    The first call for new sources takes seconds; it blocks, so it belongs into a `load` or `build`, never into a step. Safe in several processes at once.
    Calls through the library release the GIL. A library stays loaded until the process ends, so pointers to its functions stay valid.

    Args:
        folder: Holds the sources and the headers (`*.h`, `*.inc`) that they include by name.
        flags: After FLAGS, so they win over them: `-ffp-contract=off`, `-fno-tree-vectorize`, `-DNAME=1`.
        cache: For tests; by default `~/.cache/plugmesh/kernels`.

    Raises:
        NoCompiler
        BuildError: No sources, or the compiler's message.
    """
    compiler = build.find_compiler()
    if compiler is None:
        raise NoCompiler("no C++ compiler was found (on Debian: apt install g++)")
    sources = sorted(p for p in pathlib.Path(folder).iterdir() if p.suffix in (".cpp", ".h", ".inc"))
    units = [str(p) for p in sources if p.suffix == ".cpp"]
    if not units:
        raise BuildError(f"no sources in {folder}")
    digest = hashlib.sha256(repr((FLAGS, tuple(flags), _compiler(compiler), _processor())).encode())
    for path in sources:
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    kept = cache or pathlib.Path.home() / ".cache" / "plugmesh" / "kernels"
    library = kept / f"{pathlib.Path(folder).resolve().parent.name}-{digest.hexdigest()[:24]}.so"
    if not library.is_file():
        kept.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{library.stem}.", suffix=".so", dir=kept)
        os.close(handle)
        try:
            _compile([compiler, *FLAGS, *flags, "-shared", *units, "-o", name])
            os.replace(name, library)  # at once and complete: others may be looking
        finally:
            pathlib.Path(name).unlink(missing_ok=True)
    return ctypes.CDLL(str(library))


def capsule(function: Any, name: str, context: int = 0) -> object:
    """A PyCapsule that the native executor calls without the GIL.

    Args:
        function: Of a library from `load`; its C signature must be the one that belongs to `name`, nothing can check it.
        name: One of CAPSULES.
        context: Address given back to every call. What lies there must live as long as the object that offers the capsule (the weights or the codec), and
            the engine keeps that object for as long as it may call.

    Raises:
        ValueError: No such name.
    """
    if name not in CAPSULES:
        raise ValueError(f"no capsule is named {name!r}; there are {', '.join(CAPSULES)}")
    new, set_context = ctypes.pythonapi.PyCapsule_New, ctypes.pythonapi.PyCapsule_SetContext
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    set_context.restype, set_context.argtypes = ctypes.c_int, [ctypes.py_object, ctypes.c_void_p]
    made: object = new(ctypes.cast(function, ctypes.c_void_p), _name(name), None)
    if set_context(made, context or None) != 0:
        raise ValueError("the capsule takes no context")
    return made


@functools.cache
def _name(name: str) -> ctypes.c_char_p:
    """A capsule keeps the pointer to its name, not a copy."""
    return ctypes.c_char_p(name.encode())


@functools.cache
def _compiler(path: str) -> str:
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return f"{path} {done.stdout.splitlines()[:1]}"


@functools.cache
def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compile(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{(done.stderr or done.stdout)[-8000:]}")

"""Native kernels for language models on a CPU: `csrc/` behind pybind11, and the packing of weights for them (`pack`).

The compiled module is optional. `available()` says whether it can be used, `native()` gives it. Two variables choose
another one than the default; they are meant for tests and measurements, so they are no keys of `mesh.toml`:

    PLUGMESH_KERNELS_ISA   "avx512", "avx2" or "portable" instead of the best that the processor has ("none": no kernels)
    PLUGMESH_KERNELS_LIB   the file of another build of the module (see `python -m plugmesh_kernels.build`)

Importing this package loads nothing; the weightstore packs weights on machines that never compute with them.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import pathlib
import sys
from types import ModuleType

import structlog

log = structlog.get_logger()

ISAS = ("avx512", "avx2", "portable")
"""Instruction sets that kernels are written for, best first."""

_NAME = f"{__name__}._native"


class KernelsUnavailable(ImportError):
    """The compiled module is missing or does not load; the text says why and what helps."""


def available() -> bool:
    """Whether `native()` will return. The first call loads the module."""
    return not why_not()


def why_not() -> str:
    """Why the kernels cannot be used, for people; empty when they can."""
    return _loaded()[1]


def native() -> ModuleType:
    """The compiled module. Raises KernelsUnavailable."""
    module, problem = _loaded()
    if module is None:
        raise KernelsUnavailable(problem)
    return module


def isa() -> str:
    """The instruction set that is in use, one of ISAS. Raises KernelsUnavailable."""
    name: str = native().isa()
    return name


def library() -> pathlib.Path:
    """The file that `native()` came from. Raises KernelsUnavailable."""
    return pathlib.Path(native().__file__ or "")


def is_stale() -> bool:
    """Whether the module was built from other sources than those beside this file."""
    from plugmesh_kernels import build

    return build.SOURCES.is_dir() and build.built_key(library()) not in ("", build.sources_key())


@functools.cache
def _loaded() -> tuple[ModuleType | None, str]:
    """The module, or None and the reason."""
    wanted = os.environ.get("PLUGMESH_KERNELS_ISA", "")
    if wanted == "none":
        return None, "PLUGMESH_KERNELS_ISA=none"
    if wanted not in ("", *ISAS):
        return None, f"PLUGMESH_KERNELS_ISA={wanted[:40]!r} is none of {', '.join(ISAS)}, none"
    path = os.environ.get("PLUGMESH_KERNELS_LIB") or _beside()
    if not path:
        return None, "not compiled for this Python; `python -m plugmesh_kernels.build` compiles them or says what is missing"
    loader = importlib.machinery.ExtensionFileLoader(_NAME, path)
    spec = importlib.util.spec_from_file_location(_NAME, path, loader=loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except (ImportError, OSError) as e:
        return None, f"{path} cannot be loaded: {e}"
    sys.modules[_NAME] = module
    if wanted:
        try:
            module.select_isa(wanted)
        except ValueError as e:
            return None, f"PLUGMESH_KERNELS_ISA={wanted}: {e}"
    from plugmesh_kernels import build

    if build.SOURCES.is_dir() and build.built_key(pathlib.Path(path)) not in ("", build.sources_key()):
        log.warning("kernels.stale", library=path, help="python -m plugmesh_kernels.build")
    return module, ""


def _beside() -> str:
    """The built file for this interpreter in the package's folder; empty when there is none."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = pathlib.Path(__file__).with_name("_native" + suffix)
        if path.is_file():
            return str(path)
    return ""

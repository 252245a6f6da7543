"""The library's own C++ classes without its Python package, which imports torch and transformers (seconds, and hundreds of MB).

`libxgrammar_bindings.so` registers its classes with apache-tvm-ffi; a file of the package holds the declarations that pick them up. Both are loaded from where
pip put them, without running the `__init__` of the package. tvm-ffi itself imports torch if it can, for tensors that are never passed here; it is told
that there is none, in this thread and for the time of its import.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.metadata
import importlib.util
import pathlib
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from plugmesh.errors import Unavailable

_LOCK = threading.Lock()


def load(version: str) -> Any:
    """The module of the library's classes.

    Raises:
        Unavailable: It is not installed, in another version, or cannot be loaded.
    """
    with _LOCK:
        return _load(version)


@functools.lru_cache(maxsize=1)
def _load(version: str) -> ModuleType:
    try:
        found = importlib.metadata.version("xgrammar")
    except importlib.metadata.PackageNotFoundError as e:
        raise Unavailable("the library xgrammar is not installed: pip install 'plugmesh[grammar]'") from e
    if found != version:
        raise Unavailable(f"the library xgrammar is installed in version {found}; the plugin works with {version}")
    package = importlib.util.find_spec("xgrammar")  # of a top-level package: nothing is run
    folder = pathlib.Path(next(iter(package.submodule_search_locations or ()))) if package is not None else pathlib.Path()
    try:
        with _no_import_of("torch"):
            import tvm_ffi
        if "xgrammar" in sys.modules:  # whoever needs the official package has paid for it, and a class can be picked up only once
            return sys.modules["xgrammar.tvm_ffi_binding._ffi_api"]
        name = "libxgrammar_bindings.dylib" if sys.platform == "darwin" else "libxgrammar_bindings.so"
        library = tvm_ffi.load_module(str(folder / name))
        spec = importlib.util.spec_from_file_location("plugmesh_xgrammar._ffi_api", folder / "tvm_ffi_binding" / "_ffi_api.py")
        assert spec is not None and spec.loader is not None
        classes = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(classes)
    except (ImportError, OSError, RuntimeError, ValueError, KeyError, AttributeError) as e:
        raise Unavailable(f"the library xgrammar {found} cannot be loaded: {type(e).__name__}: {e}") from e
    classes.library = library  # type: ignore[attr-defined]  # it lives as long as its classes
    return classes


class _Missing(importlib.abc.MetaPathFinder):
    """Says of one module, to one thread, that it does not exist."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.thread = threading.get_ident()

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname == self.name and threading.get_ident() == self.thread:
            raise ModuleNotFoundError(f"{fullname} is left out of this import", name=fullname)


@contextlib.contextmanager
def _no_import_of(name: str) -> Iterator[None]:
    """What is imported already stays so."""
    finder = _Missing(name)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)

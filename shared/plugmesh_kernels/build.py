"""Compiles the extension `_native` from `csrc/` with the system's C++ compiler: `python -m plugmesh_kernels.build`.

`setup.py` builds by the same functions, so there is one list of flags. Which instructions may be used is written in the
sources, file by file, and chosen when the module is loaded: what is built here runs on any processor of the architecture.
Standard library only, and pybind11 for its headers; imports nothing of plugmesh, because `setup.py` loads it as a file.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import importlib.util
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence

PACKAGE = pathlib.Path(__file__).resolve().parent
SOURCES = PACKAGE / "csrc"
FLAGS = (
    "-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread",
    # g++ 12 takes the deliberately undefined operands in its own intrinsics' headers for mistakes.
    "-Wall", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized",
    "-fno-math-errno",
    # What is fused is what the sources write as fma: results must not depend on which function the compiler inlined where.
    "-ffp-contract=off",
)  # fmt: skip
MARKER = b"plugmesh-kernels-sources:"


class BuildError(Exception):
    """No compiler, no headers, or the compiler's own message."""


def module_file_name() -> str:
    """`_native` with the suffix of this interpreter."""
    return "_native" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so")


def find_compiler() -> str | None:
    """$CXX, else the first of g++, c++, clang++ on the PATH."""
    asked = shlex.split(os.environ.get("CXX", ""))[:1]
    return next((path for name in (*asked, "g++", "c++", "clang++") if (path := shutil.which(name))), None)


def sources_key(folder: pathlib.Path = SOURCES) -> str:
    """A hash of all sources, which the built file carries; another key means that it was built from other sources."""
    digest = hashlib.sha256()
    for path in _files(folder):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:32]


def built_key(library: pathlib.Path) -> str:
    """The `sources_key` that a built file carries; empty for files of another origin. Does not load it."""
    _, found, rest = library.read_bytes().partition(MARKER)
    return rest[:32].decode("ascii", "replace") if found else ""


def build(
    out: pathlib.Path = PACKAGE,
    *,
    sanitize: str = "",
    objects: pathlib.Path | None = None,
    jobs: int = 2,
    sources: pathlib.Path = SOURCES,
) -> pathlib.Path:
    """Compiles what has changed and links; returns the module's file in `out`, which appears there at once and complete.

    Args:
        objects: Where object files are kept between builds; by default nowhere.
        sanitize: For g++'s -fsanitize, "address,undefined"; such a build wants the sanitizer's library in LD_PRELOAD.

    Raises:
        BuildError
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler was found (on Debian: apt install g++)")
    if not (pathlib.Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise BuildError(f"Python's headers are not installed: no Python.h in {sysconfig.get_path('include')} (on Debian: apt install python3-dev)")
    key = sources_key(sources)  # first: a source that is changed from here on makes the result stale
    units = [p for p in _files(sources) if p.suffix == ".cpp"]
    if not units:
        raise BuildError(f"no sources in {sources}")
    includes, versions = _includes()
    flags = [*FLAGS]
    if sanitize:
        flags += [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O1"]
    # Which header belongs to which file is not asked: another header compiles everything again.
    common = hashlib.sha256(repr((compiler, flags, versions)).encode())
    for path in _files(sources):
        if path.suffix != ".cpp":
            common.update(path.read_bytes())
    with tempfile.TemporaryDirectory(prefix="plugmesh-kernels-") as name:
        temporary = pathlib.Path(name)
        kept = objects or temporary
        kept.mkdir(parents=True, exist_ok=True)

        def compile_unit(unit: pathlib.Path) -> pathlib.Path:
            digest = common.copy()
            digest.update(unit.read_bytes())
            target = kept / f"{unit.stem}-{digest.hexdigest()[:16]}.o"
            if not target.exists():
                fresh = temporary / f"{unit.stem}.o.new"
                _run([compiler, *flags, *includes, "-c", str(unit), "-o", str(fresh)])
                _move(fresh, target)
            return target

        stamp = temporary / "sources_key.cpp"
        stamp.write_text(f'extern "C" __attribute__((used)) const char plugmesh_kernels_sources[] = "{MARKER.decode()}{key}";\n')
        with concurrent.futures.ThreadPoolExecutor(max(jobs, 1)) as pool:
            # The slowest first: the vectorised files are also the longest.
            results = list(pool.map(compile_unit, sorted(units, key=lambda p: -p.stat().st_size)))
        linked = temporary / "linked.so"
        sanitizer = [f"-fsanitize={sanitize}"] if sanitize else []
        platform = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        _run([compiler, "-shared", "-fPIC", "-pthread", "-fvisibility=hidden", *sanitizer, *platform, str(stamp), *map(str, results), "-o", str(linked)])
        out.mkdir(parents=True, exist_ok=True)
        target = out / module_file_name()
        _move(linked, target)
    if objects is not None:
        _forget(objects, {r.name for r in results})
    return target


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in folder.iterdir() if p.suffix in (".cpp", ".h", ".inc"))


def _includes() -> tuple[list[str], tuple[str, ...]]:
    """Options for the headers of Python and pybind11, and what these are: a build environment of pip's has another path every time."""
    if importlib.util.find_spec("pybind11") is None:
        raise BuildError("pybind11 is not installed (pip install pybind11)")
    import pybind11

    return [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"], (sys.version, pybind11.__version__)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(command)}\n{(done.stderr or done.stdout)[-8000:]}")
    if done.stderr:
        sys.stderr.write(done.stderr)  # warnings


def _move(source: pathlib.Path, target: pathlib.Path) -> None:
    """Into its place in one step: processes that have mapped the old file keep it."""
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(source, beside)
    os.chmod(beside, 0o755)  # noqa: S103  a library, as linkers leave them
    os.replace(beside, target)


def _forget(folder: pathlib.Path, wanted: set[str], older_than_s: float = 86400.0) -> None:
    """Deletes objects of sources that nobody has built for a day."""
    for path in folder.glob("*.o"):
        if path.name in wanted:
            path.touch()
        elif time.time() - path.stat().st_mtime > older_than_s:
            path.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 when the file was built."""
    parser = argparse.ArgumentParser(prog="python -m plugmesh_kernels.build", description="Compiles the native kernels.")
    parser.add_argument("--sanitize", default="", metavar="LIST", help='sanitizers, such as "address,undefined"')
    parser.add_argument("--out", type=pathlib.Path, default=PACKAGE, metavar="DIR", help="folder for the built module (default: beside the package's files)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="compilers at the same time (default: 2)")
    parser.add_argument("--if-needed", action="store_true", help="do nothing when the module was built from these very sources")
    options = parser.parse_args(arguments)
    if options.if_needed and _is_current(options.out / module_file_name()):
        return 0
    start = time.monotonic()
    try:
        built = build(options.out, sanitize=options.sanitize, jobs=options.jobs, objects=object_folder())
    except BuildError as e:
        print(e, file=sys.stderr)
        return 1
    print(built)
    print(f"{time.monotonic() - start:.1f} s", file=sys.stderr)
    return 0


def _is_current(library: pathlib.Path) -> bool:
    return library.is_file() and built_key(library) == sources_key()


def object_folder() -> pathlib.Path | None:
    """The build folder of a source tree, which git ignores; none in an installed package."""
    root = PACKAGE.parents[1]
    return root / "build" / "kernels" if (root / "pyproject.toml").is_file() else None


if __name__ == "__main__":
    sys.exit(main())

"""The kernels' own tests once more, on a build that ends at the first wild access or undefined operation.

Takes minutes, most of them for the compiler: `.ci/run` runs it, `-m slow` does.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from plugmesh_kernels import build

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
ROOT = build.PACKAGE.parents[1]
OWN = pathlib.Path(__file__)
# What calls kernels; a file that is not there yet is left out, and some must be there.
TESTS = [
    *sorted(p for p in OWN.parent.glob("test_*.py") if p.stem not in (OWN.stem, "test_build", "test_pack")),
    *sorted((ROOT / "shared/plugmesh_engine").rglob("test_native*.py")),
]


def runtime(name: str) -> str | None:
    """Path of one of the compiler's libraries."""
    compiler = build.find_compiler()
    if compiler is None:
        return None
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
    return str(pathlib.Path(found).resolve()) if pathlib.Path(found).is_absolute() else None


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """For a process that loads the sanitized build. The sanitizer must come first, and the C++ library before anyone throws."""
    libraries = [runtime(n) for n in ("libasan.so", "libstdc++.so.6")]
    if None in libraries:
        pytest.skip("no g++ with libasan")
    library = build.build(tmp_path_factory.mktemp("sanitized"), sanitize="address,undefined", objects=build.object_folder())
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(filter(None, libraries)),
        # Leaks: Python itself keeps memory to its end.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1", "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        # numpy's small arrays then lie between guarded zones as well, not within Python's pools.
        "PYTHONMALLOC": "malloc",
        "PLUGMESH_KERNELS_LIB": str(library), "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def test_the_kernels_read_and_write_only_what_is_theirs(environment: dict[str, str]) -> None:
    assert {"test_linear", "test_attention", "test_ops"} <= {p.stem for p in TESTS}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "timeout=600", *map(str, TESTS)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1400,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]


def test_the_sanitizer_would_have_said_so(environment: dict[str, str]) -> None:
    """A read beyond the end of an array, by ctypes: it is seen because the library is loaded first and guards every allocation."""
    code = "import ctypes, plugmesh_kernels as k; k.native(); ctypes.string_at(ctypes.create_string_buffer(64), 4096)"
    done = subprocess.run([sys.executable, "-c", code], env={**environment, "PYTHONPATH": str(build.PACKAGE.parent)}, capture_output=True, text=True, timeout=120)

    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr

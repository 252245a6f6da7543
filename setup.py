"""The one part of the build that pyproject.toml cannot say: the optional extension `plugmesh_kernels._native`.

Without a compiler the installation goes on and `plugmesh_kernels.why_not()` gives the reason later.
"""

import importlib.util
import os
import pathlib

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

KERNELS = pathlib.Path(__file__).resolve().parent / "shared" / "plugmesh_kernels"


def _kernels_build():
    """plugmesh_kernels/build.py as a module, without importing its package."""
    spec = importlib.util.spec_from_file_location("plugmesh_kernels_build", KERNELS / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildKernels(build_ext):
    """Compiles by plugmesh_kernels/build.py, which developers and the sanitizer test use as well."""

    def build_extension(self, ext):
        build = _kernels_build()
        target = pathlib.Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            built = build.build(target.parent, objects=build.object_folder(), jobs=min(os.cpu_count() or 1, 4))
        except (build.BuildError, OSError) as e:
            raise CompileError(f"native kernels: {e}") from e
        assert built == target, (built, target)


def _sources():
    root = pathlib.Path(__file__).resolve().parent
    return sorted(str(p.relative_to(root)) for p in (KERNELS / "csrc").iterdir() if p.suffix in (".cpp", ".h", ".inc"))


setup(
    ext_modules=[
        Extension(
            "plugmesh_kernels._native",
            sources=[s for s in _sources() if s.endswith(".cpp")],
            depends=[s for s in _sources() if not s.endswith(".cpp")],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)

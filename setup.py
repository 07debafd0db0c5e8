"""The optional compiled part; everything else is in pyproject.toml.

``TORCHDSC_COMPILED=1`` demands it, ``0`` leaves it out. Otherwise it is built where a compiler can: without it the
package takes tensor operations in its place.
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("src/torchdsc/ops/csrc")
IS_LINUX = sys.platform == "linux"
# The runtime is the one that torch has loaded already: both name it libgomp.so.1.
OPENMP = ["-fopenmp"] if IS_LINUX else []
# A build for each kind of processor: torchdsc.ops.native imports the one that fits.
BUILDS = {"_native": []}
if IS_LINUX and platform.machine() == "x86_64":
    BUILDS |= {"_native_avx2": ["-mavx2", "-mfma"], "_native_avx512": ["-mavx512f"]}
WANTED = os.environ.get("TORCHDSC_COMPILED", "auto")
if WANTED not in ("auto", "0", "1"):
    raise SystemExit(f"TORCHDSC_COMPILED must be 0 or 1, or unset, got {WANTED!r}")
# The C code is that of GCC and Clang.
if WANTED == "0" or (WANTED == "auto" and sys.platform == "win32"):
    BUILDS = {}


class BuildExtensions(build_ext):
    """Without the paths of the Python that builds, which are those of one machine (nor, by -g0, of the sources)."""

    def build_extensions(self) -> None:
        """See setuptools."""
        linker = getattr(self.compiler, "linker_so", None)
        if linker is not None:
            self.compiler.linker_so = [word for word in linker if not word.startswith("-Wl,-rpath")]
        super().build_extensions()


class Wheel(bdist_wheel):
    """A wheel for any later Python with the compiled part, and one for any machine where nothing was compiled."""

    def finalize_options(self) -> None:
        """See setuptools."""
        self.py_limited_api = "cp311"
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        """See setuptools; called once all is built."""
        built = Path(self.get_finalized_command("build").build_lib).glob("torchdsc/ops/_native*")
        self.root_is_pure = not any(built)
        return super().get_tag()


setup(
    cmdclass={"build_ext": BuildExtensions, "bdist_wheel": Wheel},
    ext_modules=[
        Extension(
            f"torchdsc.ops.{name}",
            sorted(str(path) for path in SOURCES.glob("*.c")),
            depends=[str(SOURCES / "native.h")],
            libraries=[] if sys.platform == "win32" else ["m"],
            extra_compile_args=["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", *processor, *OPENMP],
            extra_link_args=OPENMP,
            define_macros=[("Py_LIMITED_API", "0x030B0000"), ("MODULE", name)],
            py_limited_api=True,
            optional=WANTED == "auto",
        )
        for name, processor in BUILDS.items()
    ],
)

"""The optional compiled part; everything else is in pyproject.toml."""

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("src/torchdsc/ops/csrc")
# The runtime is the one that torch has loaded already: both name it libgomp.so.1.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
# A build for each kind of processor: torchdsc.ops.native imports the one that fits.
BUILDS = {"_native": []}
if sys.platform == "linux" and platform.machine() == "x86_64":
    BUILDS |= {"_native_avx2": ["-mavx2", "-mfma"], "_native_avx512": ["-mavx512f"]}

# Without a compiler the package installs all the same, and takes tensor operations in its place.
setup(
    ext_modules=[
        Extension(
            f"torchdsc.ops.{name}",
            sorted(str(path) for path in SOURCES.glob("*.c")),
            depends=[str(SOURCES / "native.h")],
            extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", *processor, *OPENMP],
            extra_link_args=OPENMP,
            define_macros=[("Py_LIMITED_API", "0x030B0000"), ("MODULE", name)],
            py_limited_api=True,
            optional=True,
        )
        for name, processor in BUILDS.items()
    ]
)

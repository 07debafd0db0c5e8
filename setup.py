"""The optional compiled part; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("src/torchdsc/ops/csrc")
# The runtime is the one that torch has loaded already: both name it libgomp.so.1.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []

# Without a compiler the package installs all the same, and takes tensor operations in its place.
setup(
    ext_modules=[
        Extension(
            "torchdsc.ops._native",
            sorted(str(path) for path in SOURCES.glob("*.c")),
            depends=[str(SOURCES / "native.h")],
            extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", *OPENMP],
            extra_link_args=OPENMP,
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            optional=True,
        )
    ]
)

"""The optional compiled part; everything else is in pyproject.toml."""

from setuptools import Extension, setup

# Without a compiler the package installs all the same, and takes tensor operations in its place.
setup(
    ext_modules=[
        Extension(
            "torchdsc.ops._native",
            ["src/torchdsc/ops/_native.c"],
            extra_compile_args=["-O3"],
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            optional=True,
        )
    ]
)

"""Every Triton kernel compiles for a GPU, without one: the interpreter takes what the compiler's types refuse."""

import os
import platform
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# Launches are compiled for a GPU from the arguments they would run with, and not run.
COMPILE = """
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from torchdsc.ops import triton_runtime

triton_runtime.interprets = lambda: True  # Tensors on the CPU are all there is.
from torchdsc.ops.compose import triton as compose
from torchdsc.ops.route import triton as route

route.interprets = lambda: False

POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64"}
POINTERS |= {torch.int32: "*i32", torch.int64: "*i64"}


def compile_launch(kernel, *args, grid, warmup, **options):
    bound = dict(zip(kernel.arg_names, args)) | options
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = bound[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32))
    print(kernel.__name__, compiled.metadata.shared)


triton.JITFunction.run = compile_launch


def compose_inputs(tokens, atoms, top_k, width, dtype):
    coefficients = torch.rand(tokens, top_k, dtype=torch.promote_types(dtype, torch.float32))
    indices = torch.randint(atoms, (tokens, top_k))
    return *(torch.randn(n, width).to(dtype) for n in (tokens, atoms, atoms)), indices, coefficients


"""
COMPOSE = """
for shape, dtype, eps in [
    ((200, 100, 4, 384), torch.bfloat16, 1e-6), ((2, 100, 33, 100), torch.float32, 1e-6),
    ((200, 9, 1, 1), torch.float64, None),
]:
    inputs = compose_inputs(*shape, dtype)
    y, latent = compose.forward(*inputs, eps)
    compose.backward(y, *inputs, latent, eps)
"""
ROUTE = """
for (tokens, atoms, width, top_k), dtype, weight_dtype, more in [
    ((500, 1523, 384, 4), torch.float32, torch.float32, True),
    ((1, 100, 384, 64), torch.bfloat16, torch.bfloat16, False),
    ((40, 5, 3, 1), torch.float64, torch.float64, True),
]:
    x, weight = torch.randn(tokens, width).to(dtype), torch.randn(atoms, width).to(weight_dtype)
    bias, weights = (torch.rand(atoms), torch.rand(tokens)) if more else (None, None)
    route.forward(x, weight, bias, weights, top_k, 20.0, True)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs the assembler that triton brings along on x86_64")
@pytest.mark.parametrize(
    ("code", "kernels"),
    [
        (COMPOSE, {"forward_kernel", "backward_kernel", "cells_kernel", "atoms_kernel"}),
        (ROUTE, {"select_kernel", "probability_kernel"}),
    ],
    ids=["compose", "route"],
)
def test_kernels_compile(code, kernels, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE + code],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    launches = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _ in launches} == kernels
    # Shared memory that every GPU since 2018 has.
    assert all(int(shared) <= 64 * 1024 for _, shared in launches)

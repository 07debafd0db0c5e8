"""How many floating-point operations the operators take, for ``torch.utils.flop_counter.FlopCounterMode``.

As there, a multiplication and its addition are two, and products alone are counted: what the equations ask for,
whatever the implementation computes.
"""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = tuple[int, ...]


@register_flop_formula(torch.ops.torchdsc.route)
def _route(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * weight[0]


@register_flop_formula(torch.ops.torchdsc.route_backward)
def _route_backward(
    x: Shape, weight: Shape, bias: Shape | None, weights: Shape | None, indices: Shape, *others: Any, **_: Any
) -> int:
    # Logits that were not kept are computed again.
    kept, statistics = others[1], others[-1]
    products = 3 if statistics and not kept[0] else 2
    return products * _route(x, weight)


@register_flop_formula(torch.ops.torchdsc.compose)
def _compose(x: Shape, u: Shape, v: Shape, indices: Shape, *_: Any, **__: Any) -> int:
    return 2 * indices[0] * indices[1] * (u[1] + v[1])


@register_flop_formula(torch.ops.torchdsc.compose_backward)
def _compose_backward(grad: Shape, x: Shape, u: Shape, v: Shape, indices: Shape, *_: Any, **__: Any) -> int:
    return 2 * _compose(x, u, v, indices)


@register_flop_formula(torch.ops.torchdsc.latents)
def _latents(x: Shape, u: Shape, indices: Shape, *_: Any, **__: Any) -> int:
    return 2 * indices[0] * indices[1] * u[1]


@register_flop_formula(torch.ops.torchdsc.latents_backward)
def _latents_backward(grad: Shape, *inputs: Shape, **_: Any) -> int:
    return 2 * _latents(*inputs)

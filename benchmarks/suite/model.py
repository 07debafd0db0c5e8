"""Whole models of the paper's sizes: prefill by a plain forward pass, and greedy decoding through ``generate()``.

Dense 2611, MoE of five experts of 545 on each expert kernel, DSC with M 1523, K 4 and static width 327, and the DSC
model with its layers in the published formulation. Weights are random: no time here depends on their values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import Benchmark, Case, Cases, Floor, Settings
from torchdsc.lab.training.environment import quiet_transformers
from torchdsc.models import DSCGPTConfig, DSCGPTForCausalLM

from .published import PublishedLayer
from .steps import FLOAT

EXPERTS, EXPERT_WIDTH, EXPERTS_PER_TOKEN = 5, 545, 2
KERNELS = ("eager", "grouped_mm", "batched_mm")
# Kernels that no prefill takes.
_ONE_TOKEN = {"moe (batched_mm)": "gathers whole experts for every token"}


@dataclass(frozen=True)
class Sizes:
    """What a run compares: the models' sizes, the batches of a prefill, its length, and what is generated."""

    width: int = 384
    layers: int = 6
    heads: int = 6
    vocabulary: int = 50304
    batches: tuple[int, ...] = (1, 8)
    prefill: int = 256
    prompt: int = 64
    new_tokens: int = 32

    @property
    def common(self) -> dict[str, Any]:
        """Settings of every model."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "max_position_embeddings": self.prefill,
        }


QUICK = Sizes(width=32, layers=2, heads=2, vocabulary=256, batches=(1,), prefill=32, prompt=8, new_tokens=4)
_DSC = {"intermediate_size": 327, "feed_forward_options": {"num_atoms": 1523, "top_k": 4}}


class _Flat(nn.Module):
    """The published layer for tokens of shape (B, T, d)."""

    def __init__(self, layer: PublishedLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.flatten(0, -2))
        return y.view_as(x)


def _cases(settings: Settings) -> Cases:
    sizes = QUICK if settings.quick else Sizes()
    torch.manual_seed(0)
    with quiet_transformers():
        models = {name: model.to(settings.device).eval() for name, model in _models(sizes).items()}
        for batch in sizes.batches:
            ids = torch.randint(sizes.vocabulary, (batch, sizes.prefill), device=settings.device)
            calls = {name: _prefill(model, ids) for name, model in models.items() if name not in _ONE_TOKEN}
            point: dict[str, int | str] = {"kind": "prefill", "batch": batch, "tokens": sizes.prefill}
            yield Case(
                point, calls, subject="dsc", floor=_floor(models["dsc"], batch, sizes.prefill), left_out=_ONE_TOKEN
            )
        ids = torch.randint(sizes.vocabulary, (1, sizes.prompt), device=settings.device)
        calls = {name: _generate(model, ids, sizes.new_tokens) for name, model in models.items()}
        yield Case(
            {"kind": "generate", "batch": 1, "tokens": sizes.prompt, "new": sizes.new_tokens},
            calls,
            subject="dsc",
            floor=_floor(models["dsc"], 1, sizes.prompt, sizes.new_tokens),
            per=sizes.new_tokens,
            unit="ms per new token",
        )
    return None


def _models(sizes: Sizes) -> dict[str, Any]:
    experts = {"num_experts": EXPERTS, "top_k": EXPERTS_PER_TOKEN}

    def build(**options: Any) -> Any:
        return DSCGPTForCausalLM(DSCGPTConfig(**sizes.common, **options))

    models = {"dense": build(feed_forward="dense", intermediate_size=2611), "dsc": build(feed_forward="dsc", **_DSC)}
    for kernel in KERNELS:
        models[f"moe ({kernel})"] = build(
            feed_forward="moe", intermediate_size=EXPERT_WIDTH, feed_forward_options={**experts, "impl": kernel}
        )
    models["published"] = build(feed_forward="dsc", **_DSC)
    for block in models["published"].model.blocks:
        block.feed_forward = _Flat(PublishedLayer(sizes.width, 1523, 4, 327))
    return models


def _prefill(model: Any, ids: Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def call() -> object:
        return model(ids, use_cache=False)

    return call


def _generate(model: Any, ids: Tensor, new_tokens: int) -> Callable[[], object]:
    mask = torch.ones_like(ids)

    def call() -> object:
        output = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=0,
        )
        assert output.shape[1] == ids.shape[1] + new_tokens
        return output

    return call


def _floor(model: Any, batch: int, tokens: int, new_tokens: int = 0) -> Floor:
    """Weights read once a pass, two operations a weight and token; attention's own products and activations left out.

    The embeddings count once, as the head. Of the banks only the selected rows count.
    """
    banks = sum(p.numel() for name, p in model.named_parameters() if ".bank." in name)
    positions = sum(p.numel() for name, p in model.named_parameters() if "embed_positions" in name)
    head = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" in name)
    blocks = sum(p.numel() for p in model.parameters()) - banks - positions - head
    if not new_tokens:
        logits = batch * tokens * model.config.vocab_size
        return Floor(FLOAT * (blocks + head + logits), 2 * batch * tokens * (blocks + head))
    # The prompt's pass gives the first new token; the head sees one position a pass.
    positions_seen = tokens + new_tokens - 1
    return Floor(FLOAT * new_tokens * (blocks + head), 2 * (positions_seen * blocks + new_tokens * head))


MODEL = Benchmark(
    "model",
    "whole models of the paper's sizes: prefill, and decoding through generate()",
    ("tests/ops", "tests/nn", "tests/baselines", "tests/models"),
    _cases,
)

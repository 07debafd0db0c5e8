"""Adapters beside a causal LM of SmolLM2-135M's sizes: DSC against LoRA of as many parameters, merged and not.

Weights are random: their values cost no time. A merged LoRA costs nothing, so that its call is the base model's. All
models share the base's weights.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from benchmarks.case import Benchmark, Case, Cases, Settings
from torchdsc.adapters import DSCAdapterConfig
from torchdsc.lab.training.environment import quiet_transformers

MERGED, LORA = "merged lora", "lora"
BESIDE, LAYERS, NGRAMS, FEW = "dsc", "dsc beside layers", "dsc by n-grams", "dsc by n-grams in a fifth of the layers"
# What many small adapters are, of about as many parameters, and how many of them a batch mixes.
LENT, SMALL, MANY = "dsc over one bank", "lora of queries and values", 8
BLOCKS = ("self_attn", "mlp")


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model, of its adapters, and of what it is given.

    Attributes:
        model: Its arguments.
        rank: r of LoRA.
        atoms: M beside attention blocks and MLPs, at LoRA's number of parameters; half as many targets have twice as
            many, routers without parameters leave half as many again, a fifth of the layers has eight times as many.
        top_k: K.
        few_top_k: K in a fifth of the layers.
        prefills: Tokens of prompts.
        batches: Sequences that are decoded together.
        prompt: Tokens before the decoded ones.
        new_tokens: Decoded ones.
        training: Batch and tokens of a training step.
    """

    model: Mapping[str, int]
    rank: int = 8
    atoms: int = 22
    top_k: int = 4
    few_top_k: int = 16
    prefills: tuple[int, ...] = (32, 256)
    batches: tuple[int, ...] = (1, 8)
    prompt: int = 64
    new_tokens: int = 8
    training: tuple[int, int] = (4, 128)


SMOLLM2 = Sizes(
    {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
)
QUICK = Sizes(
    {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    atoms=8,
    prefills=(12,),
    batches=(2,),
    prompt=8,
    new_tokens=2,
    training=(2, 12),
)


def configs(sizes: Sizes) -> dict[str, PeftConfig]:
    """The adapters, of about as many parameters."""
    atoms, top_k = sizes.atoms, sizes.top_k
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "gamma_init": 0.1, "top_k": top_k}
    hashed = 3 * atoms // 2 // top_k * top_k
    # One in five, from the third on.
    num_layers = sizes.model["num_hidden_layers"]
    few = [*range(2, num_layers, 5)] or [num_layers - 1]
    return {
        LORA: LoraConfig(task_type="CAUSAL_LM", r=sizes.rank, target_modules="all-linear"),
        BESIDE: DSCAdapterConfig(target_modules=[*BLOCKS], num_atoms=atoms, **common),
        LAYERS: DSCAdapterConfig(target_modules=r".*layers\.\d+", num_atoms=2 * atoms, **common),
        NGRAMS: DSCAdapterConfig(
            target_modules=[*BLOCKS], num_atoms=hashed, router="ngram", ngram_orders=[2, 3], **common
        ),
        FEW: DSCAdapterConfig(
            target_modules=[*BLOCKS],
            layers_to_transform=few,
            num_atoms=8 * atoms,
            router="ngram",
            ngram_orders=[3, 4],
            **{**common, "top_k": sizes.few_top_k},
        ),
    }


def beside(base: Any, config: PeftConfig) -> Any:
    """The model with a fresh adapter; the base's weights are shared."""
    own = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
    own.train(base.training)
    return get_peft_model(own, config)


def trainable(model: Any) -> list[torch.nn.Parameter]:
    """Parameters of the adapter, or of a base model all."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def _prefill(model: Any, ids: Tensor, **options: Any) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=True, logits_to_keep=1, **options).logits
    return logits


@torch.no_grad()
def _cache(model: Any, ids: Tensor) -> DynamicCache:
    cache: DynamicCache = model(input_ids=ids, use_cache=True).past_key_values
    return cache


@torch.no_grad()
def _decode(model: Any, new: Tensor, cache: DynamicCache) -> Tensor:
    # Keys and values are replaced, not written to; the rest is small.
    kept = [layer for layer in cache.layers if hasattr(layer, "keys")]
    shared = {id(tensor): tensor for layer in kept for tensor in (layer.keys, layer.values)}
    cache = copy.deepcopy(cache, shared)
    for ids in new.split(1, dim=1):
        logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    return logits


def _train(model: Any, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    loss.backward()
    for parameter in trainable(model):
        parameter.grad = None
    return loss.detach()


def _switch(model: Any, names: Sequence[str]) -> None:
    for name in names:
        model.set_adapter(name)


def _cases(settings: Settings) -> Cases:
    sizes = QUICK if settings.quick else SMOLLM2
    vocabulary = sizes.model["vocab_size"]
    torch.manual_seed(0)
    with quiet_transformers():
        base = LlamaForCausalLM(LlamaConfig(**sizes.model)).to(settings.device).eval()
        base.requires_grad_(False)
        models = {MERGED: base} | {name: beside(base, config) for name, config in configs(sizes).items()}

        def calls(make: Callable[[Any], Callable[[], object]]) -> dict[str, Callable[[], object]]:
            return {name: make(model) for name, model in models.items()}

        for tokens in sizes.prefills:
            ids = torch.randint(vocabulary, (1, tokens), device=settings.device)
            found = calls(lambda model, ids=ids: partial(_prefill, model, ids))
            yield Case({"kind": "prefill", "batch": 1, "tokens": tokens}, found, subject=MERGED)
        for batch in sizes.batches:
            ids = torch.randint(vocabulary, (batch, sizes.prompt + sizes.new_tokens), device=settings.device)
            prompt, new = ids.split((sizes.prompt, sizes.new_tokens), dim=1)
            # Each model's own: what adapters see of past tokens is kept beside keys and values.
            with torch.no_grad():
                caches = {
                    id(model): model(input_ids=prompt, use_cache=True).past_key_values for model in models.values()
                }
            found = calls(lambda model, new=new, caches=caches: partial(_decode, model, new, caches[id(model)]))
            point: dict[str, int | str] = {"kind": "decode", "batch": batch, "tokens": sizes.prompt}
            yield Case(point, found, subject=MERGED, per=sizes.new_tokens, unit="ms per new token")
        yield from _many(base, sizes)
        ids = torch.randint(vocabulary, sizes.training, device=settings.device)
        del models[MERGED]
        for model in models.values():
            model.train()
        found = calls(lambda model: partial(_train, model, ids))
        yield Case({"kind": "training", "batch": ids.shape[0], "tokens": ids.shape[1]}, found, subject=LORA)
    lent = DSCAdapterConfig(**_lent(sizes))
    counts = {name: sum(map(Tensor.numel, trainable(model))) for name, model in models.items()}
    counts[LENT] = _added(base, sizes, lent)
    counts[SMALL] = sum(map(Tensor.numel, trainable(beside(base, _small()))))
    return {"parameters": counts}


def _lent(sizes: Sizes) -> dict[str, Any]:
    """Options of a small adapter over the bank of another."""
    options = {"target_modules": [*BLOCKS], "num_atoms": sizes.atoms, "top_k": sizes.top_k, "gamma_init": 0.1}
    return {**options, "bank_of": "default", "router": "low_rank", "router_rank": 2}


def _small() -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])


def _added(base: Any, sizes: Sizes, lent: PeftConfig) -> int:
    """Parameters that a small adapter adds."""
    model = beside(base, configs(sizes)[BESIDE])
    model.add_adapter("small", lent)
    model.set_adapter("small")
    return sum(map(Tensor.numel, trainable(model)))


def _many(base: Any, sizes: Sizes) -> Cases:
    """Several adapters in one model: a batch with one for each of its sequences, and the active one changed."""
    names = [f"customer-{number}" for number in range(MANY)]
    found = configs(sizes)
    added = {LORA: found[LORA], SMALL: _small(), LENT: DSCAdapterConfig(**_lent(sizes))}
    models = {name: beside(base, found[BESIDE] if name == LENT else config) for name, config in added.items()}
    for name in names:
        for kind, model in models.items():
            model.add_adapter(name, added[kind])
    for model in models.values():
        model.eval()
    ids = torch.randint(sizes.model["vocab_size"], (MANY, sizes.prompt), device=base.device)
    calls: dict[str, Callable[[], object]] = {
        name: partial(_prefill, model, ids, adapter_names=names) for name, model in models.items()
    }
    calls[MERGED] = partial(_prefill, base, ids)
    yield Case({"kind": "mixed batch", "batch": MANY, "tokens": sizes.prompt}, calls, subject=MERGED)
    switches = {name: partial(_switch, model, names) for name, model in models.items()}
    yield Case({"kind": "switch", "batch": 1, "tokens": 0}, switches, subject=LORA, per=MANY, unit="ms a switch")
    return None


ADAPTERS = Benchmark(
    "adapters",
    "DSC adapters beside a causal LM against LoRA, merged and not",
    ("tests/adapters/test_numerics.py", "tests/adapters/test_lent_banks.py", "tests/adapters/test_several.py"),
    _cases,
)

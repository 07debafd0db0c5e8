"""Methods as PEFT configurations, their size solved for a budget of trainable parameters."""

import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from peft import (
    LilyConfig,
    LoraConfig,
    MissConfig,
    PeftConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from torchdsc.adapters import DSCAdapterConfig, MixtureOfLoRAsConfig, scale_adapter
from torchdsc.lab.schema import SettingsError, check_fields

from .base import load_base
from .settings import WITHOUT_ADAPTER, Settings

__all__ = ["adapter_parameters", "build_model", "head_parameters", "scale_update", "solve_options"]

Options = dict[str, Any]

_CONFIGS: dict[str, type[PeftConfig]] = {
    "dsc": DSCAdapterConfig,
    "mixture_of_loras": MixtureOfLoRAsConfig,
    "lora": LoraConfig,
    "lily": LilyConfig,
    "miss": MissConfig,
    "vblora": VBLoRAConfig,
    "vera": VeraConfig,
}
# The option that makes an adapter larger.
_SIZE = {"dsc": "num_atoms", "mixture_of_loras": "num_experts", "vblora": "num_vectors"}
_SIZE |= dict.fromkeys(("lora", "lily", "miss", "vera"), "r")
# Parameters that a LoRA's update is linear in.
_LORA_ENDS = (("lora_B", ".weight"), ("lora_B", ".bias"), ("lora_embedding_B", ""))
# As PEFT has it.
_HEADS = {"classifier", "score"}


def solve_options(settings: Settings) -> Options:
    """The options of the method with the largest size whose adapter stays within the budget.

    Args:
        settings: Of the run. Without a budget its options are returned as they are, when they fit the base model.

    Raises:
        SettingsError: If the options do not fit the base model or its memory, or not a budget: they give the size
            already, or the smallest size is above it.
    """
    method, budget = settings.method, settings.budget
    if method in WITHOUT_ADAPTER:
        return {}
    name = _SIZE[method]
    if budget is not None and name in settings.options:
        raise SettingsError(f"options of {method} must leave {name} to the budget, got {settings.options[name]}")
    with torch.device("meta"):
        model = load_base(settings, 2, weights=False)
    if budget is None:
        _count(model, settings, settings.options, must_fit=True)
        return dict(settings.options)
    # Other sizes a product-key router refuses.
    power = 2 if settings.options.get("router") == "product_key" else 1
    # Each order of n-grams has atoms of its own, and as many are selected of each.
    given = settings.options.get("ngram_orders", (2, 3)) if settings.options.get("router") == "ngram" else (1,)
    # What is no list, the configuration refuses.
    orders = len(given) if isinstance(given, list | tuple) and given else 1

    def sized(root: int) -> Options:
        options = {**settings.options, name: root**power}
        if method in ("dsc", "mixture_of_loras"):
            # Few atoms are all selected.
            most = min(options.get("top_k", _CONFIGS[method]().top_k), options[name])
            options["top_k"] = most if most == options.get("top_k") else max(1, most // orders) * orders
        return options

    def count(root: int) -> int:
        return _count(model, settings, sized(root))

    if count(orders) > budget:
        raise SettingsError(f"budget of {method} must be at least {count(orders)} (size {orders}), got {budget}")

    def cost(root: int) -> int:
        try:
            return count(root)
        except SettingsError:
            # Some methods refuse sizes above the base model's.
            return budget + 1

    # What makes an adapter larger adds a parameter or more.
    largest = orders - 1 + bisect_right(range(orders, 1 + int(budget ** (1 / power))), budget, key=cost)
    _count(model, settings, sized(largest), must_fit=True)
    return sized(largest)


def _count(model: PreTrainedModel, settings: Settings, options: Options, *, must_fit: bool = False) -> int:
    """Number of parameters of the method's adapter, counted in a model on the meta device, which is not changed."""
    with _naming_options(settings.method, options):
        with torch.device("meta"):
            adapted = get_peft_model(model, _config(settings, options))
        parameters = adapter_parameters(adapted)
        stored = sum(tensor.numel() for tensor in (*adapted.parameters(), *adapted.buffers()))
        adapted.unload()
    # In float32, with gradients and Adam's two moments.
    needed, memory = 4 * (stored + 3 * parameters), psutil.virtual_memory().total
    if must_fit and needed > memory:
        raise SettingsError(
            f"the adapter of {settings.method} must fit in memory, {memory:,} bytes, got {parameters:,} parameters, "
            f"for which {needed:,} bytes are needed in training"
        )
    return parameters


def _config(settings: Settings, options: Options) -> PeftConfig:
    kind = _CONFIGS[settings.method]
    check_fields(kind, options, f"options of {settings.method}")
    if settings.method == "lora":
        # LoRA's usual proportion.
        options = {"lora_alpha": 2 * options.get("r", 8), **options}
    return kind(task_type="CAUSAL_LM" if settings.is_causal_lm else "SEQ_CLS", **options)


@contextmanager
def _naming_options(method: str, options: Options) -> Iterator[None]:
    """Turn errors of PEFT and the layers into errors that name the method's options."""
    try:
        yield
    except SettingsError:
        raise
    except re.error as error:
        names = [name for name, value in options.items() if value == error.pattern]
        reason = f"{', '.join(names)} must be a regular expression, got {error.pattern!r}: {error}"
        raise SettingsError(f"options of {method}: {reason}") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        received = "" if "got" in str(error) else f", got {options}"
        raise SettingsError(f"options of {method}: {error}{received}") from error


def build_model(settings: Settings, options: Options, labels: list[str], pad_token_id: int | None = None) -> nn.Module:
    """The base model with the method's adapter, its new head initialised by torch's present seed.

    Args:
        settings: Of the run.
        options: Of the method, with its size.
        labels: Names of the classes; one for regression, none for causal LMs.
        pad_token_id: The tokenizer's, for a base model without one: a classifier finds its last token by it.

    Returns:
        A PEFT model, or the base model, of which full fine-tuning trains all and "head" the head.
    """
    # The head first: methods of the same seed start with the same one.
    model = load_base(settings, max(1, len(labels)), weights=True)
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = pad_token_id
    if settings.kind == "classification":
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: index for index, label in enumerate(labels)}
    if settings.method == "head":
        model.requires_grad_(False)
        for parameter in head_parameters(model):
            parameter.requires_grad_(True)
    adapted: nn.Module = model
    if settings.method not in WITHOUT_ADAPTER:
        adapted = get_peft_model(model, _config(settings, options))
    return adapted


@torch.no_grad()
def scale_update(model: nn.Module, settings: Settings, factor: float) -> None:
    """Multiply what a trained model has over its base by ``factor``, in its weights; heads stay as they are."""
    if settings.method == "dsc":
        scale_adapter(model, factor)
    elif settings.method == "lora":
        ends = tuple(f".{name}.default{part}" for name, part in _LORA_ENDS)
        scaled = [parameter for name, parameter in model.named_parameters() if name.endswith(ends)]
        assert scaled, "a LoRA has one of these"
        for parameter in scaled:
            parameter.mul_(factor)
    else:
        heads = {id(parameter) for parameter in head_parameters(model)}
        num_labels = 1 if settings.is_causal_lm else getattr(model, "num_labels", 1)
        base = dict(load_base(settings, num_labels, weights=True).named_parameters())
        for name, parameter in model.named_parameters():
            if id(parameter) not in heads:
                parameter.lerp_(base[name].to(parameter.device), 1 - factor)


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of the new head of a classifier or a regression."""
    return [parameter for name, parameter in model.named_parameters() if _HEADS & set(name.split("."))]


def adapter_parameters(model: nn.Module) -> int:
    """Trainable parameters without those of heads and other modules that are trained whole."""
    wrapped = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    whole = {id(p) for module in wrapped for p in module.parameters()} | {id(p) for p in head_parameters(model)}
    return sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in whole)

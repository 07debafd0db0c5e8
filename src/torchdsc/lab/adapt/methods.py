"""Methods as PEFT configurations, their size solved for a budget of trainable parameters."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psutil
import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftConfig, VBLoRAConfig, VeraConfig, get_peft_model
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from torchdsc.adapters import DSCAdapterConfig, MixtureOfLoRAsConfig
from torchdsc.lab.loading import load_model
from torchdsc.lab.schema import SettingsError, check_fields

from .config import WITHOUT_ADAPTER, AdaptConfig, Method, Task, TaskKind, resolve_base
from .data import TaskData
from .sentences import SentenceClassifier

__all__ = ["adapter_config", "adapter_parameters", "build_model", "head_parameters", "naming_base", "solve_size"]

_CONFIGS: dict[str, type[PeftConfig]] = {
    "dsc": DSCAdapterConfig,
    "mixture_of_loras": MixtureOfLoRAsConfig,
    "lora": LoraConfig,
    "vblora": VBLoRAConfig,
    "vera": VeraConfig,
}
# The option that makes an adapter larger.
_SIZE = {"dsc": "num_atoms", "mixture_of_loras": "num_experts", "lora": "r", "vblora": "num_vectors", "vera": "r"}
# As PEFT has it.
_HEADS = {"classifier", "score"}
_TASK_TYPES: dict[TaskKind, str] = {"classification": "SEQ_CLS", "regression": "SEQ_CLS", "causal_lm": "CAUSAL_LM"}


def adapter_config(method: Method, kind: TaskKind) -> PeftConfig | None:
    """The PEFT configuration of a method; None for full fine-tuning and for a head alone.

    Raises:
        SettingsError: If an option is unknown, of another type or out of its range.
    """
    if method.kind in WITHOUT_ADAPTER:
        return None
    check_fields(_CONFIGS[method.kind], method.options, f"options of method {method.name!r}")
    options = dict(method.options)
    if method.kind == "lora":
        # LoRA's usual proportion.
        options.setdefault("lora_alpha", 2 * options.get("r", 8))
    with _naming_options(method):
        return _CONFIGS[method.kind](task_type=_TASK_TYPES[kind], **options)


def solve_size(method: Method, study: AdaptConfig) -> Method:
    """The method with the largest size whose adapter stays within its budget.

    Args:
        method: With a budget; one without is returned as it is, when its options fit the base model.
        study: With the base model and the first of the tasks.

    Returns:
        The method with its size among the options.

    Raises:
        SettingsError: If the options do not fit the base model or its memory, or not a budget: they give the size
            already, or the smallest size is above it.
    """
    if method.kind in WITHOUT_ADAPTER:
        return method
    name = _SIZE[method.kind]
    if method.budget is not None and name in method.options:
        raise SettingsError(
            f"options of method {method.name!r} must leave {name} to its budget, got {method.options[name]}"
        )
    kind = study.tasks[0].kind
    with torch.device("meta"):
        model = _pretrained(study, study.tasks[0], 2, weights=False)

    def sized(size: int) -> Method:
        options = {**method.options, name: size}
        if method.kind in ("dsc", "mixture_of_loras"):
            # Few atoms are all selected.
            default = adapter_config(replace(method, options={}), kind).top_k  # type: ignore[union-attr]
            options["top_k"] = min(options.get("top_k", default), size)
        return replace(method, options=options)

    def count(size: int) -> int:
        return _count(model, sized(size), kind)

    if method.budget is None:
        _count(model, method, kind, must_fit=True)
        return method
    # Sizes that a configuration refuses (a product-key router takes squares) are passed over.
    allowed = (lambda size: size**2) if method.options.get("router") == "product_key" else (lambda size: size)
    low, high = 1, 2
    if count(allowed(low)) > method.budget:
        raise SettingsError(
            f"budget of method {method.name!r} must be at least {count(allowed(low))} (size 1), got {method.budget}"
        )
    while count(allowed(high)) <= method.budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(allowed(middle)) <= method.budget else (low, middle)
    _count(model, sized(allowed(low)), kind, must_fit=True)
    return sized(allowed(low))


def _count(model: PreTrainedModel, method: Method, kind: TaskKind, *, must_fit: bool = False) -> int:
    """Number of parameters of the method's adapter, counted in a model on the meta device, which is not changed."""
    config = adapter_config(method, kind)
    with _naming_options(method):
        with torch.device("meta"):
            adapted = get_peft_model(model, config)
        parameters = adapter_parameters(adapted)
        stored = sum(tensor.numel() for tensor in (*adapted.parameters(), *adapted.buffers()))
        adapted.unload()
    # In float32, with gradients and Adam's two moments.
    needed, memory = 4 * (stored + 3 * parameters), psutil.virtual_memory().total
    if must_fit and needed > memory:
        raise SettingsError(
            f"method {method.name!r} must fit in memory, {memory:,} bytes, got {parameters:,} parameters of its "
            f"adapter, for which {needed:,} bytes are needed in training"
        )
    return parameters


@contextmanager
def _naming_options(method: Method) -> Iterator[None]:
    """Turn errors of PEFT and the layers into errors that name the method's options."""
    try:
        yield
    except re.error as error:
        names = [name for name, value in method.options.items() if value == error.pattern]
        reason = f"{', '.join(names)} must be a regular expression, got {error.pattern!r}: {error}"
        raise SettingsError(f"options of method {method.name!r}: {reason}") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        received = "" if "got" in str(error) else f", got {method.options}"
        raise SettingsError(f"options of method {method.name!r}: {error}{received}") from error


def build_model(method: Method, study: AdaptConfig, data: TaskData, pad_token_id: int | None = None) -> nn.Module:
    """The base model with the method's adapter, its new head initialised by torch's present seed.

    Args:
        method: With its size.
        study: With the base model and its head.
        data: Of the task, which has the labels.
        pad_token_id: The tokenizer's, for a base model without one: a classifier finds its last token by it.

    Returns:
        A PEFT model, or the base model, of which full fine-tuning trains all and "head" the head.
    """
    kind = data.task.kind
    # The head first: methods of the same seed start with the same one.
    model = _pretrained(study, data.task, max(1, len(data.labels)), weights=True)
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = pad_token_id
    if kind == "classification":
        model.config.id2label = dict(enumerate(data.labels))
        model.config.label2id = {label: index for index, label in enumerate(data.labels)}
    if method.kind == "head":
        model.requires_grad_(False)
        for parameter in head_parameters(model):
            parameter.requires_grad_(True)
    config = adapter_config(method, kind)
    adapted: nn.Module = model if config is None else get_peft_model(model, config)
    return adapted


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of the new head of a classifier or a regression."""
    return [parameter for name, parameter in model.named_parameters() if _HEADS & set(name.split("."))]


def adapter_parameters(model: nn.Module) -> int:
    """Trainable parameters without those of heads and other modules that are trained whole."""
    wrapped = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    whole = {id(p) for module in wrapped for p in module.parameters()} | {id(p) for p in head_parameters(model)}
    return sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in whole)


def _pretrained(study: AdaptConfig, task: Task, num_labels: int, *, weights: bool) -> PreTrainedModel:
    is_causal = task.kind == "causal_lm"
    settings: dict[str, Any] = dict(study.base_options or {})
    if not is_causal:
        settings |= {"num_labels": num_labels}
    if task.kind == "regression":
        settings["problem_type"] = "regression"
    path, is_embedding = resolve_base(study.base), study.head == "embedding"
    auto: Any = AutoModel if is_embedding else AutoModelForSequenceClassification
    if is_causal:
        auto = AutoModelForCausalLM
    model: PreTrainedModel
    with naming_base(study):
        if weights:
            # A base model may come with the head of another task.
            replaced = {} if is_causal else {"ignore_mismatched_sizes": True, "has_new_head": True}
            model = load_model(auto, path, dtype=torch.float32, **settings, **replaced)
        else:
            config, unknown = AutoConfig.from_pretrained(path, **settings, return_unused_kwargs=True)
            if unknown:
                raise ValueError(f"base_options must be fields of {type(config).__name__}, got {sorted(unknown)}")
            model = auto.from_config(config)
    return SentenceClassifier(model, len(task.text)) if is_embedding else model


@contextmanager
def naming_base(study: AdaptConfig) -> Iterator[None]:
    """Turn errors of the base model into errors that name it."""
    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        OSError,
        RuntimeError,
        StrictDataclassError,
        TypeError,
        ValueError,
    ) as error:
        options = f" with base_options {study.base_options}" if study.base_options else ""
        raise SettingsError(f"base {study.base!r}{options}: {error}") from error

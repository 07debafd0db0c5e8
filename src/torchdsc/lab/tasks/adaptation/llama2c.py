"""Checkpoints of llama2.c (version 0, float32) as folders for transformers: a small pretrained model from one file."""

import math
import struct
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from torchdsc.lab.files import naming_writes, whole_folder
from torchdsc.lab.training.environment import quiet_transformers

__all__ = ["convert_llama2c"]

_HEADER = struct.Struct("<7i")
_FIELDS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
_FLOAT_BYTES = 4
# What later versions of the format begin with: "ak42".
_LATER_VERSIONS = 0x616B3432

_LONGEST = struct.Struct("<i")
_PIECE = struct.Struct("<fi")
_SPECIAL = ("<unk>", "<s>", "</s>")
# The tokens that every vocabulary begins with; a byte stands for what has no piece.
_RESERVED = (*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)))
_SPACE = "▁"


def convert_llama2c(model: Path, tokenizer: Path, folder: Path) -> None:
    """Write a llama2.c checkpoint and its tokenizer as a folder that transformers loads.

    The folder has a ``LlamaForCausalLM`` in float32 with the file's logits, and a ``PreTrainedTokenizerFast`` with the
    ids of llama2.c's encoding, ``<s>`` in front. It appears whole or not at all. Generation ends at ``</s>`` and, as
    llama2.c's does, at the ``<s>`` of a next text.

    Two pieces of the same score are merged in the order of their ids, where llama2.c takes the one further left, and
    letters never become the token of a byte, as ``<0x41>`` could there. As usual with transformers, ``<s>``, ``</s>``
    and ``<unk>`` in a text are the special tokens, what follows them begins like a text of its own, and U+2581, which
    stands for the space, is read as one.

    Args:
        model: The checkpoint, such as ``stories260K.bin``: seven int32 and float32 tensors, little-endian.
        tokenizer: Its vocabulary, such as ``tok512.bin``: pieces and scores.
        folder: Where the result goes; absent or empty.

    Raises:
        ValueError: If ``folder`` holds something; ``model`` has an impossible header or another length than its header
            says; or ``tokenizer`` is cut off or malformed, or has another number of tokens than ``model``.
        OSError: If a file does not exist, or the folder cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder must be absent or empty, got {folder}, which exists")
    config = _read_config(model)
    scores = _read_pieces(tokenizer)
    if len(scores) != config.vocab_size:
        raise ValueError(f"{tokenizer} must have the {config.vocab_size} tokens of {model}, got {len(scores)}")
    fast, llama = _fast_tokenizer(scores), _llama(config, _read_tensors(model, config))
    with whole_folder(folder) as draft, quiet_transformers(), naming_writes(folder):
        llama.save_pretrained(draft)
        fast.save_pretrained(draft)


def _read_config(path: Path) -> LlamaConfig:
    """The model of a file's header, which is checked, the file's length included."""
    size = path.stat().st_size
    if size < _HEADER.size:
        raise ValueError(f"{path} must begin with a header of {_HEADER.size} bytes, got {size} bytes")
    with path.open("rb") as file:
        fields = _HEADER.unpack(file.read(_HEADER.size))
    if fields[0] == _LATER_VERSIONS:
        raise ValueError(f"{path} must be a checkpoint of version 0, got a later one (it begins with the magic 'ak42')")
    got = ", ".join(f"{name} {value}" for name, value in zip(_FIELDS, fields, strict=True))
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len = fields
    if min(*fields[:5], abs(vocab_size), seq_len) < 1:
        raise ValueError(f"{path} must have positive sizes in its header (vocab_size may be negative), got {got}")
    if dim % (2 * n_heads):
        raise ValueError(f"{path} must have a dim of n_heads heads of even size, got {got}")
    if n_heads % n_kv_heads:
        raise ValueError(f"{path} must have n_heads divisible by n_kv_heads, got {got}")
    config = LlamaConfig(
        vocab_size=abs(vocab_size),
        hidden_size=dim,
        intermediate_size=hidden_dim,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        max_position_embeddings=seq_len,
        # Neither is in the file: llama2.c has them as constants.
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        # A negative vocabulary says that the classifier has weights of its own.
        tie_word_embeddings=vocab_size > 0,
        bos_token_id=_SPECIAL.index("<s>"),
        eos_token_id=_SPECIAL.index("</s>"),
    )
    expected = _HEADER.size + _FLOAT_BYTES * sum(map(math.prod, _shapes(config).values()))
    if size != expected:
        raise ValueError(f"{path} must have {expected} bytes by its header, got {size} bytes ({got})")
    return config


def _shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in the order of the file, those of all layers together, by llama2.c's names."""
    layers, dim, hidden = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * config.head_dim
    frequencies = (config.max_position_embeddings, config.head_dim // 2)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding": (config.vocab_size, dim),
        "rms_att": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, keys, dim),
        "wv": (layers, keys, dim),
        "wo": (layers, dim, dim),
        "rms_ffn": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "rms_final": (dim,),
        "freq_cis_real": frequencies,
        "freq_cis_imag": frequencies,
    }
    return shapes if config.tie_word_embeddings else {**shapes, "wcls": (config.vocab_size, dim)}


def _read_tensors(path: Path, config: LlamaConfig) -> dict[str, Tensor]:
    """The file's tensors, mapped rather than read."""
    start, shapes = _HEADER.size // _FLOAT_BYTES, _shapes(config)
    sizes = [math.prod(size) for size in shapes.values()]
    floats = torch.from_file(str(path), shared=False, size=start + sum(sizes), dtype=torch.float32)
    parts = floats[start:].split(sizes)
    return {name: part.view(size) for (name, size), part in zip(shapes.items(), parts, strict=True)}


def _llama(config: LlamaConfig, tensors: dict[str, Tensor]) -> LlamaForCausalLM:
    """The model, which computes the tables of frequencies itself."""
    state = {
        "model.embed_tokens.weight": tensors["token_embedding"],
        "model.norm.weight": tensors["rms_final"],
        "lm_head.weight": tensors["token_embedding" if config.tie_word_embeddings else "wcls"],
    }
    for layer in range(config.num_hidden_layers):
        of_layer = {
            "self_attn.q_proj": _halves(tensors["wq"][layer], config.num_attention_heads),
            "self_attn.k_proj": _halves(tensors["wk"][layer], config.num_key_value_heads),
            "self_attn.v_proj": tensors["wv"][layer],
            "self_attn.o_proj": tensors["wo"][layer],
            "mlp.gate_proj": tensors["w1"][layer],
            "mlp.down_proj": tensors["w2"][layer],
            "mlp.up_proj": tensors["w3"][layer],
            "input_layernorm": tensors["rms_att"][layer],
            "post_attention_layernorm": tensors["rms_ffn"][layer],
        }
        state |= {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in of_layer.items()}
    # Without memory or random numbers for weights that are replaced at once.
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True)
    ends = [config.eos_token_id, config.bos_token_id]
    model.generation_config = GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=ends)
    return model


def _halves(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder each head's rows: llama2.c rotates rows 2i and 2i + 1 together, transformers i and i + head_dim / 2."""
    rows, dim = weight.shape
    return weight.view(num_heads, rows // num_heads // 2, 2, dim).transpose(1, 2).reshape(rows, dim)


def _read_pieces(path: Path) -> dict[str, float]:
    """The vocabulary in the order of its ids, under the names that transformers has for them, with the scores."""
    data, scores = path.read_bytes(), dict[str, float]()
    try:
        (longest,) = _LONGEST.unpack_from(data)
        position = _LONGEST.size
        while position < len(data):
            token = f"token {len(scores)} of {path}"
            score, length = _PIECE.unpack_from(data, position)
            if not 1 <= length <= longest:
                raise ValueError(f"{token} must have 1 to {longest} bytes by the file's header, got {length}")
            (piece,) = struct.unpack_from(f"{length}s", data, position + _PIECE.size)
            position += _PIECE.size + length
            name = _name(len(scores), piece, token)
            if not math.isfinite(score):
                raise ValueError(f"{token} must have a finite score, got {score}")
            if name in scores:
                raise ValueError(f"{token} must differ from those before it, got {name!r} again")
            scores[name] = score
    except struct.error as error:
        raise ValueError(
            f"{path} must hold whole tokens, got {len(data)} bytes: cut off in token {len(scores)}"
        ) from error
    if len(scores) < len(_RESERVED):
        raise ValueError(f"{path} must have at least {len(_RESERVED)} tokens, got {len(scores)}")
    return scores


def _name(index: int, piece: bytes, token: str) -> str:
    try:
        text = piece.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{token} must be UTF-8, got {piece!r}") from error
    if index >= len(_RESERVED):
        return text.replace(" ", _SPACE)
    # llama2.c's export puts line ends around <s> and </s>.
    if text.strip() != _RESERVED[index]:
        raise ValueError(f"{token} must be {_RESERVED[index]!r}, got {text!r}")
    return _RESERVED[index]


def _fast_tokenizer(scores: dict[str, float]) -> PreTrainedTokenizerFast:
    vocabulary = {name: index for index, name in enumerate(scores)}
    merges = _merges({name: score for name, score in scores.items() if vocabulary[name] >= len(_RESERVED)})
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    # Not Metaspace, which puts no prefix before a text that begins with a space, and so loses that space.
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Pairs whose concatenation is a piece, by falling score of the piece: what llama2.c looks for at every step."""
    pairs = []
    # Sorting is stable: pieces of one score stay in the order of their ids, and all pairs of a piece together.
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        pairs += [(left, right) for left, right in splits if left in scores and right in scores]
    return pairs

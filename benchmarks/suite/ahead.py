"""Where DSCGPT routes: in each block, before the first one, for all layers in one product, or out of an n-gram cache.

As recommended, routers see the embeddings of the last three tokens alone, so that a routing depends on a trigram. The
ways share one model's weights and give the same outputs. Tokens are random: which trigrams a cache has seen is set.
"""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicCache

from benchmarks.case import Benchmark, Case, Cases, Settings
from torchdsc import Routing, recommended
from torchdsc.lab.data.corpora import load_corpus
from torchdsc.lab.data.tokenizers import load_tokenizer
from torchdsc.lab.data.tokens import tokenize_corpus
from torchdsc.lab.training.environment import quiet_transformers
from torchdsc.models import DSCGPTConfig, DSCGPTForCausalLM
from torchdsc.nn import Seen
from torchdsc.ops import gate, select

SUBJECT = "ahead"
# Tokens that a router sees as recommended: those of a key of the cache.
NGRAM = 3
# Of the trigrams of a call, the cache has seen every so many; 0 for none.
SEEN = {"all seen": 1, "half seen": 2, "none seen": 0}
# Training text that a cache may have seen before the text in question, in tokens.
SEEN_BEFORE = (0, 1_000_000)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model, and of what it is given."""

    width: int = 384
    layers: int = 6
    heads: int = 6
    vocabulary: int = 4096
    num_atoms: int = 1551
    top_k: int = 32
    static: int = 281
    prefills: tuple[int, ...] = (64, 1024)
    batches: tuple[int, ...] = (1, 8)
    prompt: int = 64
    new_tokens: int = 16
    training: tuple[int, int] = (8, 128)

    @property
    def bytes_a_trigram(self) -> int:
        """What the tables of a cache hold for one: an int64 and a float32 for each atom of each layer."""
        return self.layers * self.top_k * (8 + 4)


QUICK = Sizes(32, 2, 2, 128, 48, 4, 16, prefills=(12,), batches=(1, 2), prompt=8, new_tokens=4, training=(2, 12))

# From what routers see to the routings of all layers; None for a layer that is to route in its block.
FindRoutings = Callable[[Seen], list[Routing | None]]


class NgramCache:
    """Routings of all layers by trigram, in tables made beforehand: a prototype, to measure what one is worth.

    A trigram is a number whose digits are its tokens. :meth:`begin` begins sequences, :meth:`take` says which tokens
    come next, and a call gives their routings.

    Args:
        model: Whose routings they are.
        capacity: Trigrams that there is room for.
    """

    def __init__(self, model: Any, capacity: int) -> None:
        self.blocks = list(model.model.blocks)
        # The last digit stands for no token, before the first.
        self.base = model.config.vocab_size + 1
        shape = (len(self.blocks), capacity, self.blocks[0].routed_layer.options.top_k)
        self.indices = torch.zeros(shape, dtype=torch.int64, device=model.device)
        self.coefficients = torch.zeros(shape, device=model.device)
        self.rows: dict[int, int] = {}
        self._kept, self._used, self._next = self.rows, 0, 0
        self._last: list[int] = []
        self._keys: list[int] = []

    def keep(self, step: int) -> None:
        """Of the trigrams stored by now, leave every so many, 0 for none, to the sequences that begin from here on."""
        keys = list(self.rows)[::step] if step else []
        self._kept, self._used = {key: self.rows[key] for key in keys}, self._next

    def begin(self, before: Tensor | None) -> None:
        """Begin sequences, after the tokens ``before`` (B, T); others' trigrams, but those kept, are forgotten."""
        self.rows, self._next, self._last = dict(self._kept), self._used, []
        if before is not None:
            self.take(before)

    def take(self, ids: Tensor) -> None:
        """Go on with tokens (B, T)."""
        base, limit = self.base, self.base**NGRAM
        sequences = ids.tolist()
        last = self._last or [limit - 1] * len(sequences)
        self._keys, self._last = [], []
        for tokens, key in zip(sequences, last, strict=True):
            for token in tokens:
                key = (key * base + token) % limit
                self._keys.append(key)
            self._last.append(key)

    def __call__(self, seen: Seen) -> list[Routing | None]:
        """Routings of the tokens taken: looked up, or computed and stored."""
        rows, missing, first = [], [], self._next
        for place, key in enumerate(self._keys):
            row = self.rows.get(key)
            if row is None:
                row = self.rows[key] = self._next
                self._next += 1
                missing.append(place)
            rows.append(row)
        if missing:
            self._store(seen, missing, first)
        chosen = torch.tensor(rows, device=self.indices.device)
        indices, coefficients = (table.index_select(1, chosen) for table in (self.indices, self.coefficients))
        return _routings(indices, coefficients, seen)

    def _store(self, seen: Seen, missing: list[int], first: int) -> None:
        places = None if len(missing) == len(self._keys) else torch.tensor(missing, device=self.indices.device)
        for block, indices, coefficients in zip(self.blocks, self.indices, self.coefficients, strict=True):
            routed = block.router_sees(seen).flatten(0, 1)
            found = block.routed_layer.route(routed if places is None else routed.index_select(0, places))
            indices[first : self._next] = found.indices
            coefficients[first : self._next] = found.coefficients


def _in_each_block(model: Any, seen: Seen) -> list[Routing | None]:
    return [None] * len(model.model.blocks)


class OneProduct:
    """Routings of all layers by one product, of weights stacked beforehand, and one selection."""

    def __init__(self, model: Any) -> None:
        blocks = list(model.model.blocks)
        self.options = blocks[0].routed_layer.options
        # Shape (L, w, 1, 1, d), for sequences of shape (B, T, d).
        self.mixes = torch.stack([block.router_context.weight.detach() for block in blocks])[:, :, None, None]
        weights = torch.stack([block.routed_layer.router.weight.detach() for block in blocks])
        # Rows of logits start at multiples of 16 elements, as the library's do.
        self.weights = functional.pad(weights, (0, 0, 0, -weights.shape[1] % 16))

    def __call__(self, seen: Seen) -> list[Routing | None]:
        options, sequences, length = self.options, seen.sequences, seen.length
        lacking = max(0, NGRAM - 1 + length - sequences.shape[1])
        sequences = functional.pad(sequences, (0, 0, lacking, 0)) if lacking else sequences
        start = sequences.shape[1] - length
        mixed = self.mixes[:, 0] * sequences.narrow(1, start, length)
        for distance in range(1, NGRAM):
            mixed.addcmul_(self.mixes[:, distance], sequences.narrow(1, start - distance, length))
        normalized = functional.layer_norm(mixed, mixed.shape[-1:]).flatten(1, 2)
        logits = torch.bmm(normalized, self.weights.mT).flatten(0, 1)[:, : options.num_atoms]
        found = select(logits, options.top_k, logit_clamp=options.logit_clamp)
        coefficients, _ = gate(found.logits, logit_clamp=options.logit_clamp, eps=options.eps, kind=options.gate)
        return _routings(found.indices, coefficients, seen)


def _routings(indices: Tensor, coefficients: Tensor, seen: Seen) -> list[Routing | None]:
    """Routings of all layers, of tensors whose rows are their tokens, layer by layer."""
    shape = (-1, seen.sequences.shape[0], seen.length, indices.shape[-1])
    return [Routing(*each) for each in zip(indices.view(shape), coefficients.view(shape), strict=True)]


class Way:
    """A copy of a model, of the same parameters, whose routings are found otherwise.

    Args:
        model: The model.
        find: How; None for the model's own way.
    """

    def __init__(self, model: Any, find: FindRoutings | None = None) -> None:
        self.model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        self.ngrams = find if isinstance(find, NgramCache) else None
        self._found: list[Routing | None] = []
        if find is not None:
            for index, block in enumerate(self.model.model.blocks):
                block.route = partial(self._route, index, find)

    def _route(self, index: int, find: FindRoutings, seen: Seen, token_mask: Tensor | None) -> Routing | None:
        assert token_mask is None
        if index == 0:
            self._found = find(seen)
        return self._found[index]

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """Logits of the last of the tokens (1, T)."""
        if self.ngrams is not None:
            self.ngrams.begin(None)
        return self._step(ids, DynamicCache(config=self.model.config))

    @torch.no_grad()
    def decode(self, new: Tensor, prompt: Tensor, cache: DynamicCache) -> Tensor:
        """Logits of the last of the tokens ``new`` (B, T), which come one by one after those of ``cache``."""
        # Keys and values are replaced, not written to; the rest is small.
        shared = {id(tensor): tensor for layer in cache.layers for tensor in (layer.keys, layer.values)}
        cache = copy.deepcopy(cache, shared)
        if self.ngrams is not None:
            self.ngrams.begin(prompt)
        for ids in new.split(1, dim=1):
            logits = self._step(ids, cache)
        return logits

    def _step(self, ids: Tensor, cache: DynamicCache) -> Tensor:
        if self.ngrams is not None:
            self.ngrams.take(ids)
        logits: Tensor = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits

    def train(self, ids: Tensor) -> Tensor:
        """The loss of tokens (B, T), after its backward pass to the gradients of the model."""
        self.model.zero_grad()
        loss: Tensor = self.model(ids, labels=ids).loss
        loss.backward()
        return loss.detach()


def _cases(settings: Settings) -> Cases:
    sizes = QUICK if settings.quick else Sizes()
    torch.manual_seed(0)
    with quiet_transformers():
        model = _model(sizes).to(settings.device).eval()
        for tokens in sizes.prefills:
            ids = torch.randint(sizes.vocabulary, (1, tokens), device=settings.device)
            calls = _calls(model, tokens, lambda way, ids=ids: partial(way.prefill, ids))
            yield Case({"kind": "prefill", "batch": 1, "tokens": tokens}, calls, subject=SUBJECT)
        for batch in sizes.batches:
            ids = torch.randint(sizes.vocabulary, (batch, sizes.prompt + sizes.new_tokens), device=settings.device)
            prompt, new = ids.split((sizes.prompt, sizes.new_tokens), dim=1)
            with torch.no_grad():
                cache = model(prompt, use_cache=True).past_key_values
            calls = _calls(model, new.numel(), lambda way, given=(new, prompt, cache): partial(way.decode, *given))
            point: dict[str, int | str] = {"kind": "decode", "batch": batch, "tokens": sizes.prompt}
            yield Case(point, calls, subject=SUBJECT, per=sizes.new_tokens, unit="ms per new token")
        ids = torch.randint(sizes.vocabulary, sizes.training, device=settings.device)
        ways = {"in each block": Way(model, partial(_in_each_block, model)), SUBJECT: Way(model)}
        for way in ways.values():
            way.model.train().gradient_checkpointing_enable({"use_reentrant": False})
        calls = {name: partial(way.train, ids) for name, way in ways.items()}
        yield Case({"kind": "training", "batch": ids.shape[0], "tokens": ids.shape[1]}, calls, subject=SUBJECT)
    return {"bytes_a_trigram": sizes.bytes_a_trigram, "trigrams_seen": _shares_seen(sizes)}


def _model(sizes: Sizes) -> Any:
    config = DSCGPTConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        dropout=0.0,
        max_position_embeddings=max(*sizes.prefills, sizes.prompt + sizes.new_tokens, sizes.training[1]),
        feed_forward="dsc",
        intermediate_size=sizes.static,
        feed_forward_options=dict(recommended(num_atoms=sizes.num_atoms, top_k=sizes.top_k)),
    )
    return DSCGPTForCausalLM(config)


def _calls(model: Any, tokens: int, make: Callable[[Way], Callable[[], Tensor]]) -> dict[str, Callable[[], object]]:
    """A call that ``make`` makes for each way; caches have seen what they are to have seen of its ``tokens``."""
    calls: dict[str, Callable[[], object]] = {
        "in each block": make(Way(model, partial(_in_each_block, model))),
        SUBJECT: make(Way(model)),
        "one product": make(Way(model, OneProduct(model))),
    }
    for name, step in SEEN.items():
        # Once for what has been seen, and again for what each call stores.
        ngrams = NgramCache(model, 2 * tokens)
        call = calls[f"n-grams, {name}"] = make(Way(model, ngrams))
        call()
        ngrams.keep(step)
    return calls


def _shares_seen(sizes: Sizes) -> list[dict[str, Any]]:
    """Which share of the trigrams of real text a cache has seen: texts of the test split, alone and after others.

    Of WikiText-2 in the folder TORCHDSC_DATA, in the lab's tokens; nothing without it.
    """
    folder = Path(os.environ.get("TORCHDSC_DATA", ""), "wikitext-2")
    if sizes is QUICK or not folder.is_dir():
        return []
    corpus = load_corpus(folder)
    tokens = tokenize_corpus(corpus, load_tokenizer("bpe", corpus, vocab_size=sizes.vocabulary), progress=False)
    shares = []
    for before in SEEN_BEFORE:
        known = set(trigrams(tokens.train[:before].tolist(), sizes.vocabulary))
        for length in sizes.prefills:
            test = tokens.test[: len(tokens.test) // length * length].reshape(-1, length).tolist()
            seen = sum(count_seen(trigrams(text, sizes.vocabulary), known) for text in test)
            found = {
                "before": before,
                "stored": len(known),
                "tokens": length,
                "share": round(seen / len(test) / length, 4),
            }
            shares.append(found)
    return shares


def trigrams(tokens: list[int], vocabulary: int) -> list[int]:
    """A number for each token of a text and the two before it."""
    none, base = vocabulary, vocabulary + 1
    padded = [none] * (NGRAM - 1) + tokens
    return [(a * base + b) * base + c for a, b, c in zip(padded, padded[1:], padded[2:], strict=False)]


def count_seen(keys: list[int], known: set[int]) -> int:
    """How many keys are known, or have come before in the same text."""
    return len(keys) - len(set(keys) - known)


AHEAD = Benchmark(
    "ahead",
    "routing in each block, before the first, in one product, and out of an n-gram cache",
    ("tests/nn", "tests/models/test_modeling.py", "tests/benchmarks/test_ahead.py"),
    _cases,
)

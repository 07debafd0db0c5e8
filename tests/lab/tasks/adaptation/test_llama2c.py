"""llama2.c's files as a folder for transformers: logits and ids against llama2.c's written plainly, and every error."""

import itertools
import random
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from torchdsc.lab.data.tokenizers import load_tokenizer
from torchdsc.lab.tasks.adaptation import base as base_module
from torchdsc.lab.tasks.adaptation.base import resolve_base
from torchdsc.lab.tasks.adaptation.llama2c import convert_llama2c

HEADER = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
RESERVED = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256))]
MERGED = [" t", "he", " a", "in", " the", "aa", "  ", "an", " in", "aaa", "and", " and", "é🙂", "é é", "\u2009a"]
LETTERS = [" ", *"abcdehint,.<0xA>é🙂", "\u2009"]
PIECES = [*RESERVED, *MERGED, *LETTERS]

SIZES = {
    "grouped": {"dim": 24, "hidden_dim": 37, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "seq_len": 13},
    "one key head": {"dim": 30, "hidden_dim": 7, "n_layers": 1, "n_heads": 5, "n_kv_heads": 1, "seq_len": 5},
    "all key heads": {"dim": 30, "hidden_dim": 41, "n_layers": 3, "n_heads": 3, "n_kv_heads": 3, "seq_len": 17},
    "smallest": {"dim": 2, "hidden_dim": 1, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "seq_len": 1},
}


def header_of(size="grouped", tied=True):
    return {**SIZES[size], "vocab_size": len(PIECES) if tied else -len(PIECES)}


def tensor_shapes(header):
    """What follows the header, in its order."""
    dim, hidden, layers, heads, kv_heads, vocab, length = (header[name] for name in HEADER)
    keys, half = kv_heads * dim // heads, dim // heads // 2
    shapes = {"embedding": (abs(vocab), dim), "att_norm": (layers, dim), "wq": (layers, dim, dim)}
    shapes |= {"wk": (layers, keys, dim), "wv": (layers, keys, dim), "wo": (layers, dim, dim)}
    shapes |= {"ffn_norm": (layers, dim), "w1": (layers, hidden, dim), "w2": (layers, dim, hidden)}
    shapes |= {"w3": (layers, hidden, dim), "norm": (dim,), "freq_real": (length, half), "freq_imag": (length, half)}
    return shapes if vocab > 0 else shapes | {"classifier": (-vocab, dim)}


def write_model(path, header):
    """A checkpoint with random weights, which it returns; the tables of frequencies are NaN, as llama2.c skips them."""
    rng, tensors = np.random.default_rng(0), {}
    for name, shape in tensor_shapes(header).items():
        tensors[name] = rng.normal(1.0 if "norm" in name else 0.0, 0.5, shape).astype("<f4")
        if name.startswith("freq"):
            tensors[name][:] = np.nan
    path.write_bytes(pack_header(header) + b"".join(tensor.tobytes() for tensor in tensors.values()))
    return tensors


def pack_header(header):
    return struct.pack("<7i", *(header[name] for name in HEADER))


def pack_tokenizer(pieces, scores):
    encoded = [piece if isinstance(piece, bytes) else piece.encode() for piece in pieces]
    parts = [struct.pack("<fi", score, len(piece)) + piece for piece, score in zip(encoded, scores, strict=True)]
    return struct.pack("<i", max(map(len, encoded))) + b"".join(parts)


def falling_scores(pieces):
    return [0.0 if i < len(RESERVED) else float(len(RESERVED) - i) for i in range(len(pieces))]


def rms_norm(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight


def rotate(x):
    """Turns 2i and 2i + 1 of each head by position * 10000 ** (-2i / head_dim); x is (tokens, heads, head_dim)."""
    length, _, head_dim = x.shape
    out = np.empty_like(x)
    for position in range(length):
        for i in range(0, head_dim, 2):
            angle = position * 10000.0 ** (-i / head_dim)
            a, b = x[position, :, i], x[position, :, i + 1]
            out[position, :, i] = a * np.cos(angle) - b * np.sin(angle)
            out[position, :, i + 1] = a * np.sin(angle) + b * np.cos(angle)
    return out


def attention(x, header, tensors, layer):
    length, heads, kv_heads = len(x), header["n_heads"], header["n_kv_heads"]
    q = rotate((x @ tensors["wq"][layer].T).reshape(length, heads, -1))
    k = rotate((x @ tensors["wk"][layer].T).reshape(length, kv_heads, -1))
    v = (x @ tensors["wv"][layer].T).reshape(length, kv_heads, -1)
    out = np.empty_like(q)
    for head in range(heads):
        group = head // (heads // kv_heads)
        for t in range(length):
            scores = k[: t + 1, group] @ q[t, head] / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            out[t, head] = weights @ v[: t + 1, group] / weights.sum()
    return out.reshape(length, -1) @ tensors["wo"][layer].T


def logits_of(ids, header, tensors):
    """The forward pass of llama2.c in float64."""
    tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    x = tensors["embedding"][ids]
    for layer in range(header["n_layers"]):
        x = x + attention(rms_norm(x, tensors["att_norm"][layer]), header, tensors, layer)
        h = rms_norm(x, tensors["ffn_norm"][layer])
        gate = h @ tensors["w1"][layer].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ tensors["w3"][layer].T)) @ tensors["w2"][layer].T
    return rms_norm(x, tensors["norm"]) @ tensors.get("classifier", tensors["embedding"]).T


def encode(text, pieces, scores):
    """llama2.c's encoding: a space in front, characters or their bytes, then the best merge, leftmost of equals."""
    index = {piece: i for i, piece in enumerate(pieces)}
    ids = [index[" "]] if text else []
    for character in text:
        ids += [index[character]] if character in index else [3 + byte for byte in character.encode()]
    while True:
        pairs = [index.get(pieces[a] + pieces[b]) for a, b in itertools.pairwise(ids)]
        found = [i for i, piece in enumerate(pairs) if piece is not None]
        if not found:
            return [1, *ids]
        best = max(found, key=lambda i: scores[pairs[i]])
        ids[best : best + 2] = [pairs[best]]


def convert(folder, header=None, pieces=PIECES, scores=None):
    """Writes both files into the folder and converts them there: returns the weights."""
    header = header or {**SIZES["smallest"], "vocab_size": len(pieces)}
    tensors = write_model(folder / "model.bin", header)
    (folder / "tokenizer.bin").write_bytes(pack_tokenizer(pieces, scores or falling_scores(pieces)))
    convert_llama2c(folder / "model.bin", folder / "tokenizer.bin", folder / "out")
    return tensors


def converted_tokenizer(folder, pieces, scores=None):
    convert(folder, pieces=pieces, scores=scores)
    return AutoTokenizer.from_pretrained(folder / "out")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return converted_tokenizer(tmp_path_factory.mktemp("tokenizer"), PIECES)


class TestModel:
    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("size", SIZES)
    def test_logits_and_config(self, tmp_path, size, tied):
        header = header_of(size, tied)
        tensors = convert(tmp_path, header)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        ids = torch.randint(len(PIECES), (1, header["seq_len"]))
        with torch.no_grad():
            logits = model(ids).logits[0]
        np.testing.assert_allclose(logits.numpy(), logits_of(ids[0].numpy(), header, tensors), rtol=0, atol=1e-4)
        assert type(model).__name__ == "LlamaForCausalLM"
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
        config = model.config
        assert (config.vocab_size, config.max_position_embeddings) == (len(PIECES), header["seq_len"])
        assert (config.bos_token_id, config.eos_token_id) == (1, 2)

    def test_generation_ends_where_another_text_begins(self, tmp_path):
        convert(tmp_path, header_of("all key heads"))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        for end in (1, 2):
            model.lm_head = torch.nn.Linear(30, len(PIECES))
            with torch.no_grad():
                model.lm_head.bias[end] = 1e4
            assert model.generate(torch.tensor([[1, 260]]), max_new_tokens=5, do_sample=False).tolist() == [
                [1, 260, end]
            ]


# What encodes and decodes otherwise: the special tokens' names and the sign for a space.
ANY_CHARACTER = st.sampled_from(LETTERS) | st.characters(exclude_characters="▁", codec="utf-8")
ANY_TEXT = st.text(ANY_CHARACTER).filter(lambda text: not re.search("<(unk|s|/s)>", text))


def check_text(tokenizer, text, pieces, scores):
    ids = tokenizer.encode(text)
    assert ids == encode(text, pieces, scores)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


class TestTokenizer:
    def test_classes_and_special_tokens(self, tokenizer):
        assert isinstance(tokenizer, PreTrainedTokenizerFast)
        assert len(tokenizer) == len(PIECES)
        assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
        assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 258]) == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
        assert tokenizer.convert_ids_to_tokens(PIECES.index(" the")) == "▁the"

    def test_some_ids_by_hand(self, tokenizer):
        pieces = [PIECES.index(piece) for piece in (" a", "n", " the")]
        assert tokenizer.encode("an the") == [1, *pieces]
        assert tokenizer.encode("\n") == [1, PIECES.index(" "), 3 + ord("\n")]
        assert tokenizer.encode("") == [1]
        assert tokenizer.encode("a", add_special_tokens=False) == [pieces[0]]

    @settings(max_examples=300, deadline=None)
    @example(text="")
    @example(text="  leading, several   and trailing  ")
    @example(text="\n\nlines\r\n\tand tabs, naïve 戦場 🙂é🙂é é \u200d \ufeff\x00\x7f\x80ÿ­")
    @example(text="<0x41> <0xZZ> <unk <s > aaaaaaaaaaa")
    @given(text=ANY_TEXT)
    def test_any_text(self, tokenizer, text):
        check_text(tokenizer, text, PIECES, falling_scores(PIECES))

    @pytest.mark.parametrize("seed", range(8))
    def test_any_vocabulary(self, tmp_path, seed):
        rng = random.Random(seed)
        words = {"".join(rng.choices("ab ", k=rng.randint(2, 5))) for _ in range(25)}
        own = [*sorted(words), *"ab "]
        rng.shuffle(own)
        # Scores in another order than ids, so that neither can stand in for the other.
        scores = [0.0] * len(RESERVED) + rng.sample(range(-50, 50), len(own))
        pieces = [*RESERVED, *own]
        loaded = converted_tokenizer(tmp_path, pieces, scores)
        for _ in range(50):
            check_text(loaded, "".join(rng.choices("ab \né", (5, 5, 3, 1, 1), k=rng.randint(0, 40))), pieces, scores)

    def test_special_tokens_in_a_text(self, tokenizer):
        """They begin a text of its own, as in training; llama2.c would take their letters."""
        a, b = PIECES.index(" a"), PIECES.index("b")
        assert tokenizer.encode("a</s><s>b<unk>") == [1, a, 2, 1, PIECES.index(" "), b, 0]
        assert tokenizer("a", "a")["input_ids"] == [1, a, 1, a]

    def test_the_sign_for_a_space_is_one(self, tokenizer):
        assert tokenizer.encode("a▁a") == tokenizer.encode("a a")

    def test_lines_without_ends_around_special_tokens(self, tmp_path, tokenizer):
        pieces = ["<unk>", "<s>", "</s>", *PIECES[3:]]
        assert converted_tokenizer(tmp_path, pieces).get_vocab() == tokenizer.get_vocab()

    def test_equal_scores_go_by_id(self, tmp_path):
        pieces = [*RESERVED, "bc", "ab", *"abc "]
        assert converted_tokenizer(tmp_path, pieces, [0.0] * len(pieces)).tokenize("abc") == ["▁", "a", "bc"]

    def test_letters_do_not_become_a_byte(self, tmp_path):
        loaded = converted_tokenizer(tmp_path, [*RESERVED, "<0", "x4", "<0x4", "1>", " ", *"<0x41>"])
        assert loaded.tokenize("<0x41>") == ["▁", "<0x4", "1>"]
        assert loaded.decode(loaded.encode("<0x41>"), skip_special_tokens=True) == "<0x41>"
        lab = load_tokenizer(tmp_path / "out", None)
        assert (lab.eos_token, lab.encode("1>")) == ("</s>", loaded.encode("1>"))


def replaced(index, piece, score=0.0):
    pieces, scores = list(PIECES), falling_scores(PIECES)
    pieces[index], scores[index] = piece, score
    return pack_tokenizer(pieces, scores)


GOOD, LAST = pack_tokenizer(PIECES, falling_scores(PIECES)), len(PIECES) - 1
WRONG_SIZES = {
    "dim": (0, "positive sizes in its header .*, got dim 0, hidden_dim 37, "),
    "hidden_dim": (-1, "positive sizes in its header .* hidden_dim -1,"),
    "n_layers": (0, "positive sizes in its header .* n_layers 0,"),
    "n_heads": (5, "dim of n_heads heads of even size, got dim 24, .* n_heads 5,"),
    "n_kv_heads": (4, "n_heads divisible by n_kv_heads, got .* n_heads 6, n_kv_heads 4,"),
    "vocab_size": (0, "positive sizes in its header .* vocab_size 0,"),
    "seq_len": (-5, "positive sizes in its header .* seq_len -5$"),
}
# What becomes of a model's file, and the error.
MODELS = {
    **{
        name: (lambda data, name=name: pack_header({**header_of(), name: WRONG_SIZES[name][0]}) + data[28:], message)
        for name, (_, message) in WRONG_SIZES.items()
    },
    "no key heads": (lambda data: pack_header({**header_of(), "n_kv_heads": 0}) + data[28:], "have positive sizes in"),
    "no header": (lambda data: data[:27], "begin with a header of 28 bytes, got 27 bytes"),
    "later version": (lambda data: b"24ka" + data[4:], "be a checkpoint of version 0, got a later one"),
    "cut off": (lambda data: data[:-1], r"have \d+ bytes by its header, got \d+ bytes \(dim 24, "),
    "longer": (lambda data: data + bytes(4), r"have \d+ bytes by its header, got \d+ bytes"),
    "no classifier": (lambda data: pack_header(header_of(tied=False)) + data[28:], "have .* by its header, .* -"),
}
TOKENIZERS = {
    "empty": (b"", "tokenizer.bin must hold whole tokens, got 0 bytes: cut off in token 0"),
    "no tokens": (GOOD[:4], "tokenizer.bin must have at least 259 tokens, got 0"),
    "cut in a head": (GOOD[:-4], rf"tokenizer.bin must hold whole tokens, got \d+ bytes: cut off in token {LAST}$"),
    "cut in a piece": (GOOD[:-1], rf"tokenizer.bin must hold whole tokens, got \d+ bytes: cut off in token {LAST}$"),
    "over-long": (GOOD + b"\0" * 5, f"tokenizer.bin must hold whole tokens, .* cut off in token {LAST + 1}$"),
    "one too few": (GOOD[:-11], f"tokenizer.bin must have the {LAST + 1} tokens of .*model.bin, got {LAST}"),
    "empty piece": (replaced(270, ""), "token 270 of .* must have 1 to 6 bytes by the file's header, got 0"),
    "negative length": (GOOD[:8] + struct.pack("<i", -1) + GOOD[12:], "token 0 of .* must have 1 to 6 .*, got -1"),
    "long piece": (struct.pack("<i", 5) + GOOD[4:], "token 2 of .* must have 1 to 5 bytes by the file's header, got 6"),
    "score": (replaced(270, "xy", float("nan")), "token 270 of .* must have a finite score, got nan"),
    "no text": (replaced(270, b"\xff"), r"token 270 of .* must be UTF-8, got b'\\xff'"),
    "twice": (replaced(270, " the"), "token 270 of .* must differ from those before it, got '▁the' again"),
    "special": (replaced(1, "<S>"), "token 1 of .*tokenizer.bin must be '<s>', got '<S>'"),
    "byte": (replaced(68, "A"), "token 68 of .*tokenizer.bin must be '<0x41>', got 'A'"),
}


class TestFiles:
    @pytest.fixture
    def files(self, tmp_path):
        write_model(tmp_path / "model.bin", header_of())
        (tmp_path / "tokenizer.bin").write_bytes(GOOD)
        return tmp_path / "model.bin", tmp_path / "tokenizer.bin", tmp_path / "out"

    @staticmethod
    def check_refused(files, message):
        before = sorted(files[2].parent.rglob("*"))
        with pytest.raises(ValueError, match=message):
            convert_llama2c(*files)
        assert sorted(files[2].parent.rglob("*")) == before

    @pytest.mark.parametrize("case", MODELS)
    def test_model(self, files, case):
        change, message = MODELS[case]
        files[0].write_bytes(change(files[0].read_bytes()))
        self.check_refused(files, f"{re.escape(str(files[0]))} must {'have .*' if case in HEADER else ''}{message}")

    @pytest.mark.parametrize("case", TOKENIZERS)
    def test_tokenizer(self, files, case):
        data, message = TOKENIZERS[case]
        files[1].write_bytes(data)
        self.check_refused(files, message)

    def test_a_folder_that_holds_something_is_left_alone(self, files):
        files[2].mkdir()
        (files[2] / "thesis.txt").write_text("mine")
        self.check_refused(files, "folder must be absent or empty, got .*/out, which exists")

    def test_good_ones_once_in_silence(self, files, capfd, cache, monkeypatch):
        base = f"llama2c:{files[0]}:{files[1]}"
        folder = Path(resolve_base(base))
        assert capfd.readouterr() == ("", "")
        assert folder.parent == cache / "llama2c"
        assert folder.stat().st_mode & 0o777 == 0o755
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
        with monkeypatch.context() as patch:
            patch.setattr(base_module, "convert_llama2c", None)
            assert resolve_base(base) == str(folder)
        files[1].write_bytes(replaced(LAST, "y"))
        assert resolve_base(base) != str(folder)


def test_real_files(shared_data, tmp_path):
    """The pretrained model of 260,032 parameters: its loss on stories like those that it learned from, and its own."""
    convert_llama2c(*(shared_data / "stories260K" / name for name in ("stories260K.bin", "tok512.bin")), tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert model.num_parameters() == 260_032
    # The file is cut off within its last story, perhaps within a character.
    sample = (shared_data / "text-other" / "tinystories_sample.txt").read_text("utf-8", "replace")
    total, count = 0.0, 0
    for story in sample.split("<|endoftext|>")[:20]:
        ids = torch.tensor([tokenizer.encode(story.strip())])
        with torch.no_grad():
            total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert total / count == pytest.approx(1.285, abs=0.03)
    ids = model.generate(torch.tensor([tokenizer.encode("Once upon a time")]), max_new_tokens=24, do_sample=False)
    begin = "Once upon a time, there was a little girl named Lily. She loved to play outside"
    assert tokenizer.decode(ids[0], skip_special_tokens=True).startswith(begin)

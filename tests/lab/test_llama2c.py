"""llama2.c's files as a folder for transformers: logits and ids against llama2.c's written plainly, and every error."""

import itertools
import random
import re
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from torchdsc.lab import llama2c
from torchdsc.lab.llama2c import convert_llama2c
from torchdsc.lab.tokenizers import load_tokenizer

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


def write_model(path, header, seed=0):
    """A checkpoint with random weights, which it returns; the tables of frequencies are NaN, as llama2.c skips them."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, shape in tensor_shapes(header).items():
        tensors[name] = rng.normal(1.0 if "norm" in name else 0.0, 0.5, shape).astype("<f4")
        if name.startswith("freq"):
            tensors[name][:] = np.nan
    path.write_bytes(pack_header(header) + b"".join(tensor.tobytes() for tensor in tensors.values()))
    return tensors


def pack_header(header):
    return struct.pack("<7i", *(header[name] for name in HEADER))


def read_model(path):
    data = path.read_bytes()
    header, position, tensors = dict(zip(HEADER, struct.unpack_from("<7i", data), strict=True)), 28, {}
    for name, shape in tensor_shapes(header).items():
        tensors[name] = np.frombuffer(data, "<f4", int(np.prod(shape)), position).reshape(shape)
        position += tensors[name].nbytes
    assert position == len(data)
    return header, tensors


def pack_tokenizer(pieces, scores):
    encoded = [piece if isinstance(piece, bytes) else piece.encode() for piece in pieces]
    parts = [struct.pack("<i", max(map(len, encoded)))]
    parts += [struct.pack("<fi", score, len(piece)) + piece for piece, score in zip(encoded, scores, strict=True)]
    return b"".join(parts)


def read_tokenizer(path):
    data, position, pieces, scores = path.read_bytes(), 4, [], []
    while position < len(data):
        score, length = struct.unpack_from("<fi", data, position)
        position += 8 + length
        pieces.append(data[position - length : position].decode())
        scores.append(score)
    return pieces, scores


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
    """Writes both files into the folder and converts them there."""
    header = header or {**SIZES["smallest"], "vocab_size": len(pieces)}
    tensors = write_model(folder / "model.bin", header)
    (folder / "tokenizer.bin").write_bytes(pack_tokenizer(pieces, scores or falling_scores(pieces)))
    convert_llama2c(folder / "model.bin", folder / "tokenizer.bin", folder / "out")
    return tensors


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    convert(folder)
    return AutoTokenizer.from_pretrained(folder / "out")


class TestModel:
    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("size", SIZES)
    def test_logits(self, tmp_path, size, tied):
        header = header_of(size, tied)
        tensors = convert(tmp_path, header)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        ids = torch.randint(len(PIECES), (1, header["seq_len"]))
        with torch.no_grad():
            logits = model(ids).logits[0]
        np.testing.assert_allclose(logits.numpy(), logits_of(ids[0].numpy(), header, tensors), rtol=0, atol=1e-4)

    @pytest.mark.parametrize("tied", [True, False])
    def test_saved_model(self, tmp_path, tied):
        header = header_of(tied=tied)
        tensors = convert(tmp_path, header)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert type(model).__name__ == "LlamaForCausalLM"
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
        used = [tensor.size for name, tensor in tensors.items() if not name.startswith("freq")]
        assert sum(parameter.numel() for parameter in model.parameters()) == sum(used)
        config = model.config
        assert (config.vocab_size, config.max_position_embeddings) == (len(PIECES), 13)
        assert (config.bos_token_id, config.eos_token_id) == (1, 2)
        assert (config.rope_parameters["rope_theta"], config.rms_norm_eps) == (10000.0, 1e-5)

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


TEXTS = [
    "",
    " ",
    "and the tin",
    "  leading, several   and trailing  ",
    "\n\nlines\r\n\tand tabs\n",
    "naïve 戦場のヴァルキュリア 🙂é🙂é é \u200d \ufeff",
    "\x00\x01\x7f\x80ÿ­",
    "<0x41> <0xZZ> <unk <s >",
    "stop . now , don't ?",
    "aaaaaaaaaaa",
]


# What encodes and decodes otherwise: the special tokens' names and the sign for a space.
ANY_CHARACTER = st.sampled_from(LETTERS) | st.characters(exclude_characters="▁", codec="utf-8")
ANY_TEXT = st.text(ANY_CHARACTER).filter(lambda text: not re.search("<(unk|s|/s)>", text))


class TestTokenizer:
    def test_classes_and_special_tokens(self, tokenizer):
        assert isinstance(tokenizer, PreTrainedTokenizerFast)
        assert len(tokenizer) == len(PIECES)
        assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
        assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 258]) == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
        assert tokenizer.convert_ids_to_tokens(PIECES.index(" the")) == "▁the"

    @pytest.mark.parametrize("text", TEXTS)
    def test_ids_and_round_trip(self, tokenizer, text):
        ids = tokenizer.encode(text)
        assert ids == encode(text, PIECES, falling_scores(PIECES))
        assert tokenizer.decode(ids, skip_special_tokens=True) == text

    def test_some_ids_by_hand(self, tokenizer):
        pieces = [PIECES.index(piece) for piece in (" a", "n", " the")]
        assert tokenizer.encode("an the") == [1, *pieces]
        assert tokenizer.encode("\n") == [1, PIECES.index(" "), 3 + ord("\n")]
        assert tokenizer.encode("") == [1]
        assert tokenizer.encode("a", add_special_tokens=False) == [pieces[0]]

    @settings(max_examples=300, deadline=None)
    @given(text=ANY_TEXT)
    @example(text="é 🙂 aaa  and")
    def test_any_text(self, tokenizer, text):
        ids = tokenizer.encode(text)
        assert ids == encode(text, PIECES, falling_scores(PIECES))
        assert tokenizer.decode(ids, skip_special_tokens=True) == text

    @pytest.mark.parametrize("seed", range(8))
    def test_any_vocabulary(self, tmp_path, seed):
        rng = random.Random(seed)
        words = {"".join(rng.choices("ab ", k=rng.randint(2, 5))) for _ in range(25)}
        own = [*sorted(words), *"ab "]
        rng.shuffle(own)
        # Scores in another order than ids, so that neither can stand in for the other.
        scores = [0.0] * len(RESERVED) + rng.sample(range(-50, 50), len(own))
        pieces = [*RESERVED, *own]
        convert(tmp_path, pieces=pieces, scores=scores)
        loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
        for _ in range(50):
            text = "".join(rng.choices("ab \né", (5, 5, 3, 1, 1), k=rng.randint(0, 40)))
            assert loaded.encode(text) == encode(text, pieces, scores)
            assert loaded.decode(loaded.encode(text), skip_special_tokens=True) == text

    def test_special_tokens_in_a_text(self, tokenizer):
        """They begin a text of its own, as in training; llama2.c would take their letters."""
        a, b = PIECES.index(" a"), PIECES.index("b")
        assert tokenizer.encode("a</s><s>b<unk>") == [1, a, 2, 1, PIECES.index(" "), b, 0]
        assert tokenizer("a", "a")["input_ids"] == [1, a, 1, a]

    def test_the_sign_for_a_space_is_one(self, tokenizer):
        assert tokenizer.encode("a▁a") == tokenizer.encode("a a")

    def test_lines_without_ends_around_special_tokens(self, tmp_path, tokenizer):
        convert(tmp_path, pieces=["<unk>", "<s>", "</s>", *PIECES[3:]])
        assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()

    def test_equal_scores_go_by_id(self, tmp_path):
        convert(tmp_path, pieces=[*RESERVED, "bc", "ab", *"abc "], scores=[0.0] * (len(RESERVED) + 6))
        loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert loaded.tokenize("abc") == ["▁", "a", "bc"]

    def test_letters_do_not_become_a_byte(self, tmp_path):
        own = ["<0", "x4", "<0x4", "1>", " ", *"<0x41>"]
        convert(tmp_path, pieces=[*RESERVED, *own])
        loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
        assert loaded.tokenize("<0x41>") == ["▁", "<0x4", "1>"]
        assert loaded.decode(loaded.encode("<0x41>"), skip_special_tokens=True) == "<0x41>"

    def test_the_lab_loads_it(self, tmp_path, tokenizer):
        convert(tmp_path)
        loaded = load_tokenizer(tmp_path / "out", None)
        assert (loaded.eos_token, loaded.encode("the")) == ("</s>", tokenizer.encode("the"))


def replaced(index, piece, score=0.0):
    pieces, scores = list(PIECES), falling_scores(PIECES)
    pieces[index], scores[index] = piece, score
    return pack_tokenizer(pieces, scores)


GOOD, LAST = pack_tokenizer(PIECES, falling_scores(PIECES)), len(PIECES) - 1
HEADERS = {
    "dim": (0, "positive sizes in its header .*, got dim 0, hidden_dim 37, "),
    "hidden_dim": (-1, "positive sizes in its header .* hidden_dim -1,"),
    "n_layers": (0, "positive sizes in its header .* n_layers 0,"),
    "n_heads": (5, "dim of n_heads heads of even size, got dim 24, .* n_heads 5,"),
    "n_kv_heads": (4, "n_heads divisible by n_kv_heads, got .* n_heads 6, n_kv_heads 4,"),
    "vocab_size": (0, "positive sizes in its header .* vocab_size 0,"),
    "seq_len": (-5, "positive sizes in its header .* seq_len -5$"),
}
TOKENIZERS = {
    "empty": (b"", "tokenizer.bin must begin with the length of the longest token in 4 bytes, got 0 bytes"),
    "no tokens": (GOOD[:4], "tokenizer.bin must have at least 259 tokens, got 0"),
    "cut in a head": (
        GOOD[:-4],
        f"token {LAST} of .*tokenizer.bin must begin with 8 bytes, got 7: the file is cut off",
    ),
    "cut in a piece": (GOOD[:-1], f"token {LAST} of .*tokenizer.bin must have 3 bytes, got 2: the file is cut off"),
    "over-long": (GOOD + b"\0" * 5, f"token {LAST + 1} of .*tokenizer.bin must begin with 8 bytes, got 5"),
    "one too few": (GOOD[:-11], f"tokenizer.bin must have the {LAST + 1} tokens of .*model.bin, got {LAST}"),
    "one too many": (
        GOOD + struct.pack("<fi", 0, 2) + b"xy",
        f"tokenizer.bin must have the {LAST + 1} tokens of .*model.bin, got {LAST + 2}",
    ),
    "empty piece": (replaced(270, ""), "token 270 of .* must have 1 to 6 bytes by the file's header, got 0"),
    "negative length": (
        GOOD[:8] + struct.pack("<i", -1) + GOOD[12:],
        "token 0 of .* must have 1 to 6 bytes .*, got -1",
    ),
    "long piece": (struct.pack("<i", 5) + GOOD[4:], "token 2 of .* must have 1 to 5 bytes by the file's header, got 6"),
    "score": (replaced(270, "xy", float("nan")), "token 270 of .* must have a finite score, got nan"),
    "no text": (replaced(270, b"\xff"), r"token 270 of .* must be UTF-8, got b'\\xff'"),
    "twice": (replaced(270, " the"), "token 270 of .* must differ from those before it, got '▁the' again"),
    "special": (replaced(1, "<S>"), "token 1 of .*tokenizer.bin must be '<s>', got '<S>'"),
    "byte": (replaced(68, "A"), "token 68 of .*tokenizer.bin must be '<0x41>', got 'A'"),
}


class TestErrors:
    @pytest.fixture
    def files(self, tmp_path):
        write_model(tmp_path / "model.bin", header_of())
        (tmp_path / "tokenizer.bin").write_bytes(GOOD)
        return tmp_path / "model.bin", tmp_path / "tokenizer.bin", tmp_path / "out"

    @staticmethod
    def check_refused(files, message=None, error=ValueError):
        before = sorted(path.name for path in files[2].parent.iterdir())
        with pytest.raises(error, match=message):
            convert_llama2c(*files)
        assert sorted(path.name for path in files[2].parent.iterdir()) == before

    def test_the_files_are_good(self, files):
        convert_llama2c(*files)

    @pytest.mark.parametrize("name", HEADERS)
    def test_header(self, files, name):
        value, message = HEADERS[name]
        files[0].write_bytes(pack_header({**header_of(), name: value}) + files[0].read_bytes()[28:])
        self.check_refused(files, f"{re.escape(str(files[0]))} must have .*{message}")

    @pytest.mark.parametrize("length", [0, 27])
    def test_no_header(self, files, length):
        files[0].write_bytes(files[0].read_bytes()[:length])
        self.check_refused(files, f"model.bin must begin with a header of 28 bytes, got {length} bytes")

    def test_later_version(self, files):
        files[0].write_bytes(b"24ka" + files[0].read_bytes()[4:])
        self.check_refused(files, "model.bin must be a checkpoint of version 0, got a later one")

    @pytest.mark.parametrize("change", [-4, -1, 1, 4])
    def test_length_of_the_model(self, files, change):
        data = files[0].read_bytes()
        files[0].write_bytes((data + b"\0" * 4)[: len(data) + change])
        self.check_refused(files, f"must have {len(data)} bytes by its header, got {len(data) + change} bytes")

    def test_classifier_missing(self, files):
        files[0].write_bytes(pack_header(header_of(tied=False)) + files[0].read_bytes()[28:])
        self.check_refused(files, "model.bin must have .* bytes by its header, .* vocab_size -")

    @pytest.mark.parametrize("case", TOKENIZERS)
    def test_tokenizer(self, files, case):
        data, message = TOKENIZERS[case]
        files[1].write_bytes(data)
        self.check_refused(files, message)

    @pytest.mark.parametrize("index", [0, 1])
    def test_missing_file(self, files, index):
        files[index].unlink()
        self.check_refused(files, re.escape(str(files[index])), FileNotFoundError)

    def test_folder_with_something_in_it(self, files):
        files[2].mkdir()
        (files[2] / "kept").write_text("kept")
        self.check_refused(files, f"folder must be absent or empty, got {re.escape(str(files[2]))}")
        assert [path.name for path in files[2].iterdir()] == ["kept"]

    def test_folder_is_a_file(self, files):
        files[2].write_text("kept")
        self.check_refused(files, "folder must be absent or empty")
        assert files[2].read_text() == "kept"

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_interruption_leaves_nothing(self, files, monkeypatch, error):
        def interrupted(self, folder):
            assert (folder / "model.safetensors").is_file()
            raise error

        monkeypatch.setattr(llama2c.PreTrainedTokenizerFast, "save_pretrained", interrupted)
        self.check_refused(files, error=error)

    def test_empty_and_nested_folders(self, files):
        files[2].mkdir()
        convert_llama2c(*files)
        convert_llama2c(*files[:2], files[2].with_name("new") / "nested")
        assert sorted(path.name for path in files[2].parent.iterdir()) == ["model.bin", "new", "out", "tokenizer.bin"]
        assert [path.name for path in (files[2].with_name("new")).iterdir()] == ["nested"]

    def test_says_nothing(self, files, capfd):
        convert_llama2c(*files)
        assert capfd.readouterr() == ("", "")

    def test_others_may_read(self, files):
        convert_llama2c(*files)
        assert files[2].stat().st_mode & 0o777 == 0o755
        assert {path.stat().st_mode & 0o777 for path in files[2].iterdir()} == {0o644}


@pytest.fixture(scope="module")
def real(shared_data, tmp_path_factory):
    """The pretrained model of 260,032 parameters, its tokenizer, and stories like those that it learned from."""
    folder = tmp_path_factory.mktemp("real") / "stories260K"
    files = [shared_data / "stories260K" / name for name in ("stories260K.bin", "tok512.bin")]
    convert_llama2c(*files, folder)
    sample = shared_data / "text-other" / "tinystories_sample.txt"
    return SimpleNamespace(
        checkpoint=read_model(files[0]),
        vocabulary=read_tokenizer(files[1]),
        model=AutoModelForCausalLM.from_pretrained(folder).eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        # The file is cut off within its last story, perhaps within a character.
        stories=[story.strip() for story in sample.read_text("utf-8", "replace").split("<|endoftext|>")],
    )


class TestRealFiles:
    def test_logits(self, real):
        assert real.model.num_parameters() == 260_032
        ids = real.tokenizer.encode(real.stories[0])[:100]
        with torch.no_grad():
            logits = real.model(torch.tensor([ids])).logits[0]
        np.testing.assert_allclose(logits.numpy(), logits_of(ids, *real.checkpoint), rtol=0, atol=1e-4)

    def test_ids(self, real):
        for text in (*real.stories[:5], *TEXTS):
            ids = real.tokenizer.encode(text)
            assert ids == encode(text, *real.vocabulary)
            assert real.tokenizer.decode(ids, skip_special_tokens=True) == text

    def test_loss(self, real):
        total, count = 0.0, 0
        for story in real.stories[:20]:
            ids = torch.tensor([real.tokenizer.encode(story)])
            with torch.no_grad():
                total += real.model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        assert count > 6000
        assert total / count == pytest.approx(1.285, abs=0.03)

    def test_greedy_continuation(self, real):
        ids = torch.tensor([real.tokenizer.encode("Once upon a time")])
        ids = real.model.generate(ids, max_new_tokens=150, do_sample=False)
        text = real.tokenizer.decode(ids[0], skip_special_tokens=True)
        assert text.startswith("Once upon a time, there was a little girl named Lily. She loved to play outside in the")
        words, known = (set(re.findall(r"[\w']+", text)) for text in (text, " ".join(real.stories)))
        assert len(words) > 40
        assert words <= known

"""A base model of seconds, and files to adapt it to."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from torchdsc.lab.tasks.adaptation.settings import Settings

WORDS = ["good", "bad", "film", "the", "was", "very", "not", "it"]


def _tokenizer():
    vocab = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", sep_token="[SEP]", model_max_length=64
    )


def _folder(factory, name, model, config):
    torch.manual_seed(0)
    folder = factory.mktemp(name)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model(config(vocab_size=16, **sizes)).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """Folder of a tiny BERT and its tokenizer."""
    return _folder(tmp_path_factory, "encoder", BertForSequenceClassification, BertConfig)


@pytest.fixture(scope="session")
def decoder(tmp_path_factory):
    """Folder of a tiny Llama and its tokenizer."""
    return _folder(tmp_path_factory, "decoder", LlamaForCausalLM, LlamaConfig)


def sentence(index):
    """A sentence and whether it is a good one, which its first word tells."""
    words = [WORDS[index % 2], *(WORDS[2 + (index * step) % 6] for step in range(1, 2 + index % 5))]
    return " ".join(words), 1 - index % 2


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    """Files of sentences with labels, in every format."""
    folder = tmp_path_factory.mktemp("reviews")
    rows = [sentence(index) for index in range(64)]
    table = "".join(f"{text}\t{label}\n" for text, label in rows)
    (folder / "train.tsv").write_text("\ufeffsentence\tlabel\n" + table, encoding="utf-8")
    (folder / "bare.tsv").write_text(table, encoding="utf-8")
    quoted = "".join(f'"{text}, ""so""",{label}\n' for text, label in rows)
    (folder / "train.csv").write_text("sentence,label\n" + quoted, encoding="utf-8")
    lines = "".join(json.dumps({"sentence": text, "label": label}) + "\n" for text, label in rows)
    (folder / "train.jsonl").write_text(lines, encoding="utf-8")
    (folder / "dev.tsv").write_text("sentence\tlabel\nbad film\t0\ngood it was very\t1\nbad\t0\n", encoding="utf-8")
    (folder / "scores.tsv").write_text(
        "sentence1\tsentence2\tscore\n" + "".join(f"{text}\tthe film\t{5 * label}\n" for text, label in rows)
    )
    (folder / "prose.txt").write_text(" ".join(text for text, _ in rows * 4))
    (folder / "old.txt").write_text("the film was very good " * 40)
    return folder


@pytest.fixture(scope="session")
def settings(encoder, reviews):
    """Makes settings of seconds, with LoRA on an encoder; keywords replace some."""

    def make(**changes):
        values = {
            **{"base": encoder, "train": str(reviews / "train.tsv"), "text": ["sentence"]},
            **{"method": "lora", "options": {"r": 2, "target_modules": ["query", "value"]}},
            **{"steps": 4, "batch_size": 4, "warmup_steps": 1, "validation_examples": 8, "max_length": 16},
        }
        return Settings(**(values | changes))

    return make


@pytest.fixture(scope="session")
def pairs(reviews):
    """Settings that differ for a regression on two texts."""
    columns = {"text": ["sentence1", "sentence2"], "label": "score"}
    return {"train": str(reviews / "scores.tsv"), "kind": "regression", **columns}


@pytest.fixture(scope="session")
def prose(decoder, reviews):
    """Settings that differ for a causal LM."""
    lora = {"options": {"r": 2, "target_modules": ["q_proj"]}, "validation_examples": 4}
    return {"base": decoder, "train": str(reviews / "prose.txt"), "kind": "causal_lm", "text": ["text"], **lora}

"""Causal language models of transformers, from config, against the same with converted feed-forward layers.

Each architecture is trained as it is and with DSC as recommended in place of its MLPs, at no more parameters (beside
experts, which then are narrower to make room), on the same batches, with as many trials of the learning rate. Writes
what it measured as JSON: `python examples/convert_models.py TEXT_FOLDER OUTPUT.json`, with wiki.train.tokens and
wiki.valid.tokens of WikiText-2 in the folder.
"""

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm

import torchdsc
from torchdsc.lab.training.environment import command_line, commit, hardware, versions

VOCABULARY, WIDTH, LAYERS, HEADS, LENGTH = 2048, 96, 4, 4, 128
STEPS, BATCH, WARMUP, EVALUATED = 50, 8, 10, 32
RATES, SEEDS = (0.001, 0.002, 0.004, 0.008), (0, 1, 2)
SIZES = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
LLAMA = {**SIZES, "intermediate_size": 256, "num_key_value_heads": HEADS, "max_position_embeddings": LENGTH}
# Each with tied embeddings, as DSCGPT.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", LLAMA),
    "Mistral": ("MistralForCausalLM", {**LLAMA, "sliding_window": 32}),
    "Qwen2": ("Qwen2ForCausalLM", LLAMA),
    "Qwen3": ("Qwen3ForCausalLM", {**LLAMA, "head_dim": WIDTH // HEADS}),
    "GPT-2": (
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": LENGTH}
        | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    ),
    "GPT-NeoX": (
        "GPTNeoXForCausalLM",
        {**SIZES, "intermediate_size": 4 * WIDTH, "max_position_embeddings": LENGTH},
    ),
    "Mixtral": (
        "MixtralForCausalLM",
        {**LLAMA, "intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}
# A mixture of experts of this width leaves room for DSC beside it.
NARROWER = {"Mixtral": {"intermediate_size": 96}}


def build(name: str, converted: bool, seed: int) -> nn.Module:
    """A model with random weights; a converted one stores no more than the other."""
    class_name, sizes = MODELS[name]
    model_class = getattr(transformers, class_name)

    def make(**changes: int) -> Any:
        torch.manual_seed(seed)
        return model_class(model_class.config_class(**{**sizes, **changes, "tie_word_embeddings": True}))

    if not converted:
        return make()
    if name not in NARROWER:
        model = make()
        torchdsc.convert(model, mode="replace", match="parameters", **torchdsc.recommended())
        return model
    model, room = make(**NARROWER[name]), count(make()) - count(make(**NARROWER[name]))
    # An atom is 3 d parameters a layer; short convolutions and gamma are 8 d.
    num_atoms = (room // LAYERS - 8 * WIDTH) // (3 * WIDTH)
    torchdsc.convert(model, target=r"\.mlp$|block_sparse_moe$", **torchdsc.recommended(num_atoms=num_atoms))
    return model


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def train(model: nn.Module, tokens: Tensor, valid: Tensor, rate: float, seed: int, bar: tqdm) -> float:
    """Validation loss after the last step, in nats a token."""
    groups = torchdsc.parameter_groups(model, learning_rate=rate, weight_decay=0.1, router_lr_multiplier=5.0)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(STEPS):
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,), generator=generator)
        batch = torch.stack([tokens[start : start + LENGTH] for start in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.update()
    model.eval()
    with torch.no_grad():
        losses = [model(input_ids=batch, labels=batch).loss.item() for batch in valid.split(8)]
    return sum(losses) / len(losses)


def main(folder: str, output: str) -> None:
    texts = [Path(folder, f"wiki.{split}.tokens").read_text(encoding="utf-8") for split in ("train", "valid")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.train_from_iterator(texts[:1], trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False))
    tokens, valid = (torch.tensor(tokenizer.encode(text).ids) for text in texts)
    valid = valid[: EVALUATED * LENGTH].view(EVALUATED, LENGTH)
    rows = []
    # The rate is chosen on the first seed, by the same loss for both; the others run at it.
    total = len(MODELS) * 2 * (len(RATES) + len(SEEDS) - 1) * STEPS
    with tqdm(total=total, unit="step") as bar:
        for name, converted in product(MODELS, (False, True)):
            bar.set_description(f"{name}{', converted' if converted else ''}")
            trials = {
                rate: train(build(name, converted, SEEDS[0]), tokens, valid, rate, SEEDS[0], bar) for rate in RATES
            }
            rate = min(trials, key=trials.__getitem__)
            others = [train(build(name, converted, seed), tokens, valid, rate, seed, bar) for seed in SEEDS[1:]]
            row = {"model": name, "converted": converted, "parameters": count(build(name, converted, 0)), "rate": rate}
            rows.append({**row, "trials": trials, "losses": [trials[rate], *others]})
    about = {"command": command_line(), "commit": commit(), "versions": versions(), "hardware": hardware()}
    settings = {"width": WIDTH, "layers": LAYERS, "vocabulary": VOCABULARY, "steps": STEPS, "batch": BATCH}
    record = {**about, "settings": {**settings, "length": LENGTH, "seeds": SEEDS, "rates": RATES}, "rows": rows}
    Path(output).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name in MODELS:
        plain, converted = (row for row in rows if row["model"] == name)
        means = [sum(row["losses"]) / len(row["losses"]) for row in (plain, converted)]
        sizes = f"{plain['parameters']:,} / {converted['parameters']:,}"
        print(f"{name:9} {sizes:>24}  {means[0]:.3f} -> {means[1]:.3f}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])

"""A small language model learns three texts one after another: what it keeps of each, and what can be taken back.

LoRA and DSC adapters of the same size in all, in these ways: one adapter trained on one text after another; an adapter
a text, side by side, of which the earlier ones are kept; an adapter a text, switched by who knows the text; and DSC
with atoms that are added for each text. After the last text what the second has taught is taken back.

`python examples/learn_in_turn.py OUTPUT.json` with TORCHDSC_DATA; half an hour on a core.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from torchdsc.adapters import DSCAdapterConfig, add_atoms, remove_atoms
from torchdsc.lab.files import expand
from torchdsc.lab.tasks.adaptation.base import resolve_base
from torchdsc.lab.training.environment import command_line, commit, hardware, quiet_transformers, versions

BASE = "llama2c:${TORCHDSC_DATA}/stories260K/stories260K.bin:${TORCHDSC_DATA}/stories260K/tok512.bin"
OLD = "text-other/tinystories_sample.txt"
TEXTS = {
    "Shakespeare": "text-other/tinyshakespeare.txt",
    "Holmes": "text-other/holmes.txt",
    "Wikipedia": "wikitext-raw/wiki.valid.raw",
}
LENGTH, BATCH, STEPS, WARMUP, BLOCKS = 128, 8, 100, 10, 64
RATES, TRIAL_SEED, SEEDS = (0.005, 0.015, 0.05), 1000, (0, 1, 2)
# A text's part: 23,120 parameters of LoRA 4 beside all linear layers, and fewer of atoms beside ten blocks.
RANK, ATOMS, TOP_K = 4, 11, 8
IN_TURN, ADDED, BESIDE, SWITCHED = "one after another", "atoms added", "side by side", "switched"
METHODS = [
    *(("LoRA", way) for way in (IN_TURN, BESIDE, SWITCHED)),
    *(("DSC", way) for way in (IN_TURN, BESIDE, SWITCHED, ADDED)),
]


class Learner:
    """A base model with adapters of a kind, that learns texts in one of the ways."""

    def __init__(self, kind: str, way: str, folder: str, seed: int) -> None:
        self.kind, self.way = kind, way
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        # In one adapter for all texts there is room for three.
        self.model = get_peft_model(model, self.config(3 if way == IN_TURN else 1), adapter_name="first")
        self.names: dict[str, str] = {}

    def config(self, texts: int) -> Any:
        if self.kind == "LoRA":
            return LoraConfig(r=RANK * texts, lora_alpha=2 * RANK * texts, target_modules="all-linear")
        return DSCAdapterConfig(target_modules=["self_attn", "mlp"], num_atoms=ATOMS * texts, top_k=TOP_K)

    def begin(self, text: str) -> None:
        """Make room for a text."""
        is_first = not self.names
        self.names[text] = "first" if is_first or self.way == IN_TURN else text
        if is_first or self.way == IN_TURN:
            return
        if self.way == ADDED:
            add_atoms(self.model, ATOMS, origin=text, adapter_name="first")
            return
        self.model.add_adapter(text, self.config(1))
        self.activate([*self.names.values()] if self.way == BESIDE else [text])
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(f".{text}." in name)

    def activate(self, names: list[str]) -> None:
        self.model.base_model.set_adapter(names)

    def measure(self, texts: dict[str, Tensor]) -> dict[str, float]:
        """The loss on each text; switched adapters are those of the text, or none for others."""
        found = {}
        for text, blocks in texts.items():
            if self.way != SWITCHED:
                found[text] = loss_of(self.model, blocks)
            elif text in self.names:
                self.activate([self.names[text]])
                found[text] = loss_of(self.model, blocks)
            else:
                with self.model.disable_adapter():
                    found[text] = loss_of(self.model, blocks)
        return found

    def forget(self, text: str) -> bool:
        """Take back what a text has taught, if that can be done."""
        if self.way == IN_TURN:
            return False
        if self.way == ADDED:
            remove_atoms(self.model, origin=text, adapter_name="first")
        else:
            self.model.delete_adapter(self.names[text])
            del self.names[text]
            if self.way == BESIDE:
                self.activate([*self.names.values()])
        return True


def train(model: nn.Module, blocks: Tensor, rate: float, seed: int, bar: tqdm) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(STEPS):
        batch = blocks[torch.randint(len(blocks), (BATCH,), generator=generator)]
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.update()
    model.eval()


@torch.no_grad()
def loss_of(model: nn.Module, blocks: Tensor) -> float:
    losses = [model(input_ids=batch, labels=batch).loss.item() for batch in blocks.split(BATCH)]
    return sum(losses) / len(losses)


def run(kind: str, way: str, folder: str, data: Any, rate: float, seed: int, part: int, bar: tqdm) -> dict[str, Any]:
    """Learn all texts; losses on held-out blocks after each, and after the second is taken back."""
    held = {name: blocks[part * BLOCKS :][:BLOCKS] for name, blocks in data.items()}
    learner = Learner(kind, way, folder, seed)
    size, after = 0, {}
    for text in TEXTS:
        learner.begin(text)
        if way != IN_TURN or not after:
            size += sum(p.numel() for p in learner.model.parameters() if p.requires_grad)
        train(learner.model, data[text][2 * BLOCKS :], rate, seed, bar)
        after[text] = learner.measure(held)
    second = [*TEXTS][1]
    removed = learner.measure(held) if learner.forget(second) else None
    return {"seed": seed, "rate": rate, "trained_parameters": size, "after": after, f"without_{second}": removed}


def mean_of_learnt(record: dict[str, Any]) -> float:
    last = [*record["after"].values()][-1]
    return sum(last[text] for text in TEXTS) / len(TEXTS)


def read_texts(folder: str) -> dict[str, Tensor]:
    """Blocks of each text, of shape (n, LENGTH). The first are held out: for the choice of a rate, and what is told."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = {}
    for name, file in {"stories": OLD, **TEXTS}.items():
        # One of the files has a few bytes that are no UTF-8.
        text = (Path(expand("${TORCHDSC_DATA}")) / file).read_text(encoding="utf-8", errors="replace")
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        data[name] = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return data


def write(output: str, **found: Any) -> None:
    """A record of what was found, and how."""
    about = {"command": command_line(), "commit": commit(), "versions": versions(), "hardware": hardware()}
    settings = {"length": LENGTH, "batch": BATCH, "steps": STEPS, "seeds": SEEDS}
    Path(output).write_text(json.dumps({**about, "settings": settings, **found}, indent=1) + "\n", encoding="utf-8")


def main(output: str) -> None:
    folder = resolve_base(BASE)
    data = read_texts(folder)
    rows = []
    total = len(METHODS) * (len(RATES) + len(SEEDS)) * len(TEXTS) * STEPS
    with quiet_transformers(), tqdm(total=total, unit="step") as bar:
        for kind, way in METHODS:
            bar.set_description(f"{kind}, {way}")
            trials = [run(kind, way, folder, data, rate, TRIAL_SEED, 0, bar) for rate in RATES]
            best = min(trials, key=mean_of_learnt)["rate"]
            runs = [run(kind, way, folder, data, best, seed, 1, bar) for seed in SEEDS]
            rows.append({"kind": kind, "way": way, "rate": best, "trials": trials, "runs": runs})
            last, removed = [*runs[0]["after"].values()][-1], runs[0][f"without_{[*TEXTS][1]}"]
            tell = [f"{value:.3f}" for value in last.values()] + [f"{value:.3f}" for value in (removed or {}).values()]
            bar.write(f"{kind}, {way}, {best:g}: {' '.join(tell)}")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    before = {name: loss_of(base, blocks[BLOCKS : 2 * BLOCKS]) for name, blocks in data.items()}
    write(output, rates=RATES, before=before, rows=rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])

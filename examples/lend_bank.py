"""Small adapters over the bank of another: what they learn, beside others of as few parameters.

A small language model has learnt Shakespeare into a DSC adapter. Holmes and Wikipedia are learnt into adapters over its
bank, which stays as it is (`bank_of`), over a bank that has learnt nothing, and by LoRA and VeRA.

`python examples/lend_bank.py OUTPUT.json` with TORCHDSC_DATA; half an hour on a core.
"""

import sys
from statistics import fmean
from typing import Any

import torch
from learn_in_turn import BASE, BLOCKS, SEEDS, STEPS, TRIAL_SEED, loss_of, read_texts, train, write
from peft import LoraConfig, VeraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from torchdsc.adapters import DSCAdapterConfig
from torchdsc.lab.tasks.adaptation.base import resolve_base
from torchdsc.lab.training.environment import quiet_transformers

FIRST, THEN = "Shakespeare", ("Holmes", "Wikipedia")
RATES, FIRST_RATE = (0.005, 0.015, 0.05, 0.15), 0.015
BANK = {"target_modules": ["self_attn", "mlp"], "num_atoms": 64, "top_k": 8}
LENT = {**BANK, "bank_of": "first", "router": "low_rank"}
METHODS: dict[str, Any] = {
    "DSC over a lent bank, rank 2": DSCAdapterConfig(**LENT, router_rank=2),
    "DSC over a bank that has learnt nothing, rank 2": DSCAdapterConfig(**LENT, router_rank=2),
    "LoRA 3 of query and value": LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"]),
    "VeRA 16": VeraConfig(r=16, target_modules="all-linear"),
    "DSC over a lent bank, rank 4": DSCAdapterConfig(**LENT, router_rank=4),
    "LoRA 1": LoraConfig(r=1, lora_alpha=2, target_modules="all-linear"),
    "VeRA 78": VeraConfig(r=78, target_modules="all-linear"),
}


def run(
    method: str, folder: str, blocks: Tensor, lender: dict[str, Tensor], rate: float, seed: int, part: int, bar: tqdm
) -> dict[str, Any]:
    """Learn a text; the loss on held-out blocks."""
    config = METHODS[method]
    model = new_model(folder, DSCAdapterConfig(**BANK) if "bank" in method else config, seed)
    if "bank" in method:
        if "nothing" not in method:
            model.load_state_dict(lender, strict=False)
        model.add_adapter("second", config)
        model.set_adapter("second")
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    train(model, blocks[2 * BLOCKS :], rate, seed, bar)
    loss = loss_of(model, blocks[part * BLOCKS :][:BLOCKS])
    return {"seed": seed, "rate": rate, "trained_parameters": size, "loss": loss}


def new_model(folder: str, config: Any, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return get_peft_model(base, config, adapter_name="first")


def main(output: str) -> None:
    folder = resolve_base(BASE)
    data = read_texts(folder)
    rows = []
    total = STEPS * (1 + len(METHODS) * len(THEN) * (len(RATES) + len(SEEDS)))
    with quiet_transformers(), tqdm(total=total, unit="step") as bar:
        model = new_model(folder, DSCAdapterConfig(**BANK), 0)
        train(model, data[FIRST][2 * BLOCKS :], FIRST_RATE, 0, bar)
        first = loss_of(model, data[FIRST][BLOCKS : 2 * BLOCKS])
        lender = {name: value for name, value in model.state_dict().items() if ".first." in name}
        for method in METHODS:
            bar.set_description(method)
            for text in THEN:
                trials = [run(method, folder, data[text], lender, rate, TRIAL_SEED, 0, bar) for rate in RATES]
                best = min(trials, key=lambda trial: trial["loss"])["rate"]
                runs = [run(method, folder, data[text], lender, best, seed, 1, bar) for seed in SEEDS]
                rows.append({"method": method, "text": text, "rate": best, "trials": trials, "runs": runs})
                loss = fmean(one["loss"] for one in runs)
                bar.write(f"{method}, {text}, {best:g}: {loss:.3f} ({runs[0]['trained_parameters']:,})")
    write(output, first={"text": FIRST, "rate": FIRST_RATE, "loss": first}, rates=RATES, rows=rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])

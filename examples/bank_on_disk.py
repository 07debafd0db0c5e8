"""A bank of atoms that is larger than the memory: how long a prompt and a token take while its rows lie on disk.

    python examples/bank_on_disk.py runs/large results.json

makes a DSCGPT with 2 GB of atoms in the folder, once, and runs it in processes of their own, in turn: with the file
mapped into memory as `from_pretrained` leaves it, and with `torchdsc.nn.leave_on_disk`, where rows are read alone, and
then asked for ahead as well. In a container of little memory (`docker run --memory 700m`, or a memory cgroup) the bank
does not fit. Without a limit the model in memory is measured too. A process starts with nothing of the file in memory,
and tokens are drawn at random. On Linux.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from torchdsc.lab.training.environment import command_line, commit, hardware, quiet_transformers, versions
from torchdsc.models import DSCGPTConfig, DSCGPTForCausalLM
from torchdsc.nn import leave_on_disk

SIZES = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
ATOMS = {"num_atoms": 1_000_000, "top_k": 18, "router": "ngram", "ngram_orders": [1, 2, 3], "frame_weight": 0.0}
SEEN = {"router_input": "embeddings", "router_context": 3, "input_context": 4, "static": "gated"}
MAPPED, ROWS, AHEAD, MEMORY = "mapped by the system", "rows alone", "rows alone, asked for ahead", "in memory"
PROMPT, GENERATED, ROUNDS = 64, 16, 3


def main(folder: str, output: str) -> None:
    """Make the model where it is not there, and measure each way in turn."""
    quiet_transformers()
    if not (Path(folder) / "model.safetensors").exists():
        DSCGPTForCausalLM(DSCGPTConfig(**SIZES, feed_forward_options=ATOMS | SEEN)).save_pretrained(folder)
    size, limit = (Path(folder) / "model.safetensors").stat().st_size, memory_limit()
    fits = limit is None or limit > 2 * size
    found: dict[str, list[dict[str, float]]] = {way: [] for way in (MAPPED, ROWS, AHEAD, *[MEMORY] * fits)}
    for seed in range(ROUNDS):
        for way in found:
            call = [sys.executable, __file__, folder, "--way", way, "--seed", str(seed)]
            found[way].append(json.loads(subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout))
            print(f"{seed + 1} of {ROUNDS}, {way}: {found[way][-1]}", flush=True)
    medians = {way: {name: median(run[name] for run in runs) for name in runs[0]} for way, runs in found.items()}
    best = medians[AHEAD]
    record = {
        "memory_limit_bytes": limit,
        "bank_bytes": int(2 * ATOMS["num_atoms"] * SIZES["hidden_size"] * 4 * SIZES["num_hidden_layers"]),
        "over_asked_for_ahead": {
            way: {name: row[name] / best[name] for name in ("prompt", "token")} for way, row in medians.items()
        },
        "runs": found,
        **{"command": command_line(), "commit": commit(), "versions": versions(), "hardware": hardware()},
    }
    file = Path(output)
    records = json.loads(file.read_text())["measurements"] if file.exists() else []
    file.write_text(json.dumps({"measurements": [*records, record]}, indent=1) + "\n")


def run(folder: str, way: str, seed: int) -> dict[str, float]:
    """Seconds of a prompt and of a generated token, and megabytes held of files, in this process."""
    model = DSCGPTForCausalLM.from_pretrained(folder).eval()
    with (Path(folder) / "model.safetensors").open("rb") as file:
        # What an earlier process has read is dropped.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if way == MEMORY:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    elif way != MAPPED:
        leave_on_disk(model, ahead=way == AHEAD)
    torch.manual_seed(seed)
    tokens = []
    with torch.inference_mode():
        ids = torch.randint(SIZES["vocab_size"], (1, PROMPT))
        start = time.perf_counter()
        past = model(ids, use_cache=True).past_key_values
        prompt = time.perf_counter() - start
        for token in torch.randint(SIZES["vocab_size"], (GENERATED, 1, 1)):
            start = time.perf_counter()
            past = model(token, past_key_values=past, use_cache=True).past_key_values
            tokens.append(time.perf_counter() - start)
    held = re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())
    return {"prompt": prompt, "token": median(tokens), "held_mb": int(held[1]) / 1024 if held else 0.0}


def memory_limit() -> int | None:
    """Bytes that the control group of this process may use; None where no limit is found."""
    groups = Path("/sys/fs/cgroup")
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        file = groups / path.strip("/") / "memory.max"
        if controllers == "memory":
            file = groups / "memory" / path.strip("/") / "memory.limit_in_bytes"
        if controllers in ("", "memory") and file.exists() and (limit := file.read_text().strip()) != "max":
            # The older kind has a number near 2^63 for none.
            return int(limit) if int(limit) < 1 << 60 else None
    return None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of the model, which is made where there is none")
    parser.add_argument("output", nargs="?", default="results.json", help="JSON that the measurement is added to")
    # A process of one of the ways.
    parser.add_argument("--way", choices=(MAPPED, ROWS, AHEAD, MEMORY), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(run(options.folder, options.way, options.seed)))
    else:
        main(options.folder, options.output)

"""The main job: methods and seeds trained at equal budgets, and compared in a table, pictures and a report."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from torchdsc.models import DSCGPTForCausalLM

from .budget import Plan
from .config import ExperimentConfig
from .corpora import Corpus, load_corpus
from .latency import measure_in_turn
from .report import write_report
from .tables import print_table, summarize, to_markdown
from .tokenizers import load_tokenizer, write_atomically
from .tokens import FixedWindows, tokenize_corpus
from .training import MODEL, RECORD, Data, make_plans, train_run, write_json

__all__ = ["compare", "open_folder", "prepare_data"]

CONFIG, RESULTS, REPORT, TABLE = "config.yaml", "results.json", "report.html", "table.md"
_LATENCY = "latency.json"


def compare(config: ExperimentConfig, folder: Path, *, console: Console | None = None) -> list[dict[str, Any]]:
    """Run an experiment, or what is left of it, and write its results.

    ``folder`` ends with ``config.yaml``, one folder a run, ``results.json``, ``table.md`` and ``report.html``. Runs that are
    there already are kept; one that was interrupted goes on from its last checkpoint.

    Args:
        config: The experiment.
        folder: The experiment's own folder.
        console: Where to print.

    Returns:
        The records of all runs, in the form of DESIGN.md.

    Raises:
        ValueError: If ``folder`` holds another experiment or other files, the corpus has changed since, or a budget is infeasible.
        OSError: If ``folder`` cannot be written.
    """
    console = console or Console()
    open_folder(folder, config)
    data = prepare_data(config, folder)
    plans = make_plans(config, data.vocab_size)
    _print_plans(console, plans)
    pairs = [(method, seed) for seed in config.seeds for method in config.methods]
    runs = []
    for index, (method, seed) in enumerate(pairs, 1):
        place = folder / f"{method}-seed{seed}"
        state = "done before" if (place / RECORD).is_file() else "training"
        console.print(f"[bold]run {index} of {len(pairs)}[/]: {method}, seed {seed} ({state})", highlight=False)
        runs.append(train_run(config, plans[method], seed, data, place))
        gc.collect()
    _check_corpus(runs, data.corpus, folder)
    latency = _latency(config, data, folder)
    runs = [{**run, "latency_ms": latency[run["method"]]} for run in runs]
    write_results(runs, folder)
    print_table(summarize(runs), console)
    console.print(f"report: {folder / REPORT}", highlight=False, soft_wrap=True)
    return runs


def write_results(runs: list[dict[str, Any]], folder: Path) -> None:
    """Write ``results.json``, ``table.md`` and ``report.html``."""
    write_json(folder / RESULTS, {"format": 1, "runs": runs})
    text = to_markdown(summarize(runs))
    write_atomically(folder / TABLE, lambda file: _write_text(file, text + "\n"))
    write_report(runs, folder)


def open_folder(folder: Path, config: ExperimentConfig) -> None:
    """Take ``folder`` for an experiment: a new or empty one, or one that holds this very experiment.

    Args:
        folder: The folder.
        config: The experiment, whose resolved config is kept in it.

    Raises:
        ValueError: If it holds an experiment with another config, or other files.
        OSError: If it cannot be written.
    """
    path = folder / CONFIG
    if path.is_file():
        kept = yaml.safe_load(path.read_text(encoding="utf-8"))
        if kept != config.as_dict():
            wanted = config.as_dict()
            different = sorted(key for key in {*kept, *wanted} if kept.get(key) != wanted.get(key))
            raise ValueError(
                f"folder {folder} must be free or hold this experiment, got another in: {', '.join(different)}"
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder must be new, empty or an experiment's, got {folder} with other files")
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.as_dict(), sort_keys=False)
    write_atomically(path, lambda file: _write_text(file, text))


def prepare_data(config: ExperimentConfig, folder: Path) -> Data:
    """Load and tokenise the corpus; the tokenizer is kept in ``folder``.

    Args:
        config: The experiment.
        folder: Its folder.

    Returns:
        Corpus and tokens.

    Raises:
        ValueError: If a split is shorter than a window, or the corpus unusable.
    """
    corpus = load_corpus(config.corpus, preparation=config.preparation, max_bytes=config.max_bytes)
    tokenizer = load_tokenizer(config.tokenizer, corpus, vocab_size=config.vocab_size)
    tokens = tokenize_corpus(corpus, tokenizer)
    for split in (tokens.train, tokens.valid, tokens.test):
        FixedWindows(split, config.window)
    tokenizer.save_pretrained(folder / "tokenizer")
    return Data(corpus, tokens)


def _check_corpus(runs: list[dict[str, Any]], corpus: Corpus, folder: Path) -> None:
    if any(run["corpus"]["sha256"] != corpus.sha256 for run in runs):
        raise ValueError(
            f"corpus {corpus.name!r} must be the one that the runs in {folder} saw, got another text: "
            "choose a new folder for it"
        )


def _latency(config: ExperimentConfig, data: Data, folder: Path) -> dict[str, dict[str, Any]]:
    """Forward pass of one evaluation batch through each method's first model, in turn."""
    windows = FixedWindows(data.tokens.valid, config.window)
    batch = torch.stack([windows[i % len(windows)]["input_ids"] for i in range(config.eval_batch_size)])
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def forward(method: str) -> Callable[[], object]:
        path = folder / f"{method}-seed{config.seeds[0]}" / MODEL
        model = DSCGPTForCausalLM.from_pretrained(path).eval().to(device)
        inputs = batch.to(device)

        @torch.inference_mode()
        def call() -> object:
            return model(inputs, use_cache=False)

        return call

    timings = measure_in_turn({method: forward(method) for method in config.methods}, rounds=config.latency_rounds)
    measured = {
        method: {"median": t.median, "q1": t.q1, "q3": t.q3, "batch": list(batch.shape), "samples": t.samples}
        for method, t in timings.items()
    }
    write_json(folder / _LATENCY, measured)
    return measured


def _print_plans(console: Console, plans: dict[str, Plan]) -> None:
    for method, plan in plans.items():
        console.print(
            f"{method}: {plan.description}; {plan.params_total / 1e6:.3f} M stored, "
            f"{plan.params_active / 1e6:.3f} M active",
            highlight=False,
        )


def _write_text(file: Any, text: str) -> None:
    file.write(text.encode("utf-8"))

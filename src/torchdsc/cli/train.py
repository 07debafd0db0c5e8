"""``torchdsc train``."""

from dataclasses import replace
from pathlib import Path

from torchdsc.lab.config import METHODS

from .options import experiment_parser, parse_experiment
from .parsing import SUPPRESS

_OF_COMPARE = ("methods", "seeds")


def run(arguments: list[str]) -> None:
    """Train one method with one seed."""
    parser = experiment_parser("train", "Train one method with one seed.", "quick")
    parser.add_argument("--method", default="dsc", choices=METHODS, help="feed-forward layer of the model")
    parser.add_argument("--seed", type=int, default=42, help="of weights, dropout and windows")
    parser.add_argument("--output", type=str, default=SUPPRESS, help="folder (default: runs/PRESET-METHOD-seedSEED)")
    parser.hide(*_OF_COMPARE)
    for argument in arguments:
        if argument.partition("=")[0].rstrip("+") in [f"--{name}" for name in _OF_COMPARE]:
            raise ValueError(f"train takes one --method and one --seed, got {argument}")
    options, config = parse_experiment(parser, arguments)
    config = replace(config, methods=[options.method], seeds=[options.seed])
    # Imported late: --help and wrong flags answer at once.
    from torchdsc.lab.budget import describe_misses
    from torchdsc.lab.experiment import prepare
    from torchdsc.lab.training import MODEL, train_run

    folder = Path(options.get("output") or f"runs/{options.preset}-{options.method}-seed{options.seed}")
    print(f"corpus {config.corpus}: reading, and encoding what is new", flush=True)
    data, plans = prepare(config, folder)
    plan = plans[options.method]
    for line in describe_misses(plans, config.budget(data.vocab_size), config.match):
        print(f"warning: {line}")
    record = train_run(config, plan, options.seed, data, folder)
    # One that diverged leaves none.
    model = f"model: {folder / MODEL}" if (folder / MODEL).is_dir() else f"no model: see {folder}"
    print(
        f"{options.method}: {plan.description}; validation loss {record['val_loss_final']:.4f}, "
        f"test loss {record['test_loss']:.4f}\n{model}"
    )

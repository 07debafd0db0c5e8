"""``torchdsc train``."""

from dataclasses import replace
from pathlib import Path

from .options import experiment_parser, parse_experiment


def run(arguments: list[str]) -> None:
    """Train one method with one seed."""
    parser = experiment_parser("torchdsc train", "Train one method with one seed.", "quick")
    parser.add_argument("--method", default="dsc", help="dense, moe, mixture_of_loras or dsc")
    parser.add_argument("--seed", type=int, default=42, help="of weights, dropout and windows")
    parser.add_argument("--output", type=str | None, default=None, help="folder (default: runs/PRESET-METHOD-seedSEED)")
    options, config = parse_experiment(parser, arguments)
    config = replace(config, methods=[options.method], seeds=[options.seed])
    from torchdsc.lab.compare import open_folder, prepare_data
    from torchdsc.lab.training import MODEL, make_plans, train_run

    folder = Path(options.output or f"runs/{options.preset}-{options.method}-seed{options.seed}")
    open_folder(folder, config)
    data = prepare_data(config, folder)
    plan = make_plans(config, data.vocab_size)[options.method]
    record = train_run(config, plan, options.seed, data, folder)
    print(
        f"{options.method}: {plan.description}; validation loss {record['val_loss_final']:.4f}, "
        f"test loss {record['test_loss']:.4f}\nmodel: {folder / MODEL}"
    )

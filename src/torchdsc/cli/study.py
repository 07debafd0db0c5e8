"""``torchdsc study``."""

from pathlib import Path

from torchdsc.lab.presets import preset_names, read_preset
from torchdsc.lab.schema import check_fields, naming, read_yaml
from torchdsc.lab.study.config import StudyConfig

from .parsing import command_parser

_FOLDER = "study"


def run(arguments: list[str]) -> None:
    """Train variants of the layers at equal budgets, each tuned by the same number of trials."""
    parser = command_parser(
        "study",
        "Train variants of the layers at equal budgets, each tuned by trials on the validation part.",
        "(--preset NAME | --config FILE) [--seeds SEED ...] [--output FOLDER]",
    )
    parser.add_argument("--preset", type=str | None, default=None, help=", ".join(preset_names(_FOLDER)))
    parser.add_argument("--config", type=str | None, default=None, help="YAML file of a study")
    parser.add_argument("--seeds", nargs="+", type=int, default=None, help="in place of the study's")
    parser.add_argument("--output", type=str | None, default=None, help="folder of the study (default: runs/study-...)")
    options = parser.parse_args(arguments)
    if (options.preset is None) == (options.config is None):
        raise ValueError("one of --preset and --config must be given")
    values = read_yaml(Path(options.config)) if options.preset is None else read_preset(options.preset, _FOLDER)
    if options.seeds is not None:
        values |= check_fields(StudyConfig, {"seeds": options.seeds})
    with naming(options.config):
        config = StudyConfig.from_dict(values)
    # Imported late: --help and wrong flags answer at once.
    from torchdsc.lab.study.study import run_study

    name = options.preset or Path(options.config).stem
    with naming(options.config):
        run_study(config, Path(options.output or f"runs/study-{name}"))

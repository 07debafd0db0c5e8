"""``torchdsc study``."""

from pathlib import Path

from torchdsc.lab.presets import preset_names, read_preset
from torchdsc.lab.schema import check_fields, naming, read_yaml
from torchdsc.lab.study.config import StudyConfig

from .parsing import SUPPRESS, add_dry_run, add_print_config, check_folder, command_parser, print_settings

_FOLDER = "study"


def run(arguments: list[str]) -> None:
    """Train variants of the layers at equal budgets, each tuned by the same number of trials."""
    parser = command_parser(
        "study",
        "Train variants of the layers at equal budgets, each tuned by trials on the validation part.",
        "(--preset NAME | --config FILE) [--seeds SEED ...] [--output FOLDER] [--dry_run] [--print_config]",
        print_config=None,
    )
    presets = f"{', '.join(preset_names(_FOLDER))}; `torchdsc presets` says what each is for"
    parser.add_argument("--preset", type=str | None, default=SUPPRESS, help=presets)
    parser.add_argument("--config", type=str | None, default=SUPPRESS, help="YAML file of a study")
    parser.add_argument("--seeds", nargs="+", type=int, default=SUPPRESS, help="in place of the study's")
    parser.add_argument("--output", type=str, default=SUPPRESS, help="folder of the study (default: runs/study-...)")
    add_dry_run(parser)
    add_print_config(parser)
    options = parser.parse_args(arguments)
    preset, file = options.get("preset"), options.get("config")
    if (preset is None) == (file is None):
        raise ValueError("one of --preset and --config must be given")
    values = read_yaml(Path(file)) if preset is None else read_preset(preset, _FOLDER)
    named = check_folder(values.pop("output", None), file)
    folder = options.get("output") or named or f"runs/study-{preset or Path(file).stem}"
    if options.get("seeds") is not None:
        values |= check_fields(StudyConfig, {"seeds": options.seeds})
    with naming(file):
        config = StudyConfig.from_dict(values)
    if options.get("print_config"):
        print_settings({"output": folder, **config.as_dict()})
        return
    # Imported late: --help and wrong flags answer at once.
    from torchdsc.lab.study.study import dry_run, run_study

    with naming(file):
        (dry_run if options.get("dry_run") else run_study)(config, Path(folder))

"""``torchdsc adapt``."""

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import docstring_parser

from torchdsc.lab.adapt.config import KINDS, WITHOUT_ADAPTER, AdaptConfig, Method, Task
from torchdsc.lab.presets import preset_names, read_preset
from torchdsc.lab.schema import build, check_fields, naming, parse_yaml, read_yaml

from .parsing import (
    SUPPRESS,
    ArgumentParser,
    add_dry_run,
    add_print_config,
    check_folder,
    command_parser,
    print_settings,
    without_looking,
)

_TASK_FLAGS = [f.name for f in fields(Task) if f.name not in ("name", "steps")]
_STUDY_FLAGS = [f.name for f in fields(AdaptConfig) if f.name not in ("base", "tasks", "methods")]
_LISTS = ("text", "columns", "seeds", "learning_rates", "tuning_tasks")
# Budget of a method that --method gives by its kind, rather than by a name in the preset.
_DEFAULT_BUDGET = 100_000


def run(arguments: list[str]) -> None:
    """Adapt a pretrained model to tasks, by one method or several."""
    preset = _parser().parse_args(without_looking(arguments)).get("preset")
    # Defaults in the help are those of the preset that is given.
    options = vars(_parser(read_preset(preset, "adapt") if preset else {}).parse_args(arguments))
    config = _config(options)
    folder = options.get("output") or _values(options)[1] or f"runs/adapt-{preset or config.tasks[0].name}"
    if options.get("print_config"):
        print_settings({"output": folder, **config.as_dict()})
        return
    # Imported late: --help and wrong flags answer at once.
    from torchdsc.lab.adapt.study import adapt, dry_run

    with naming(options.get("config")):
        (dry_run if options.get("dry_run") else adapt)(config, Path(folder))


def _parser(values: Mapping[str, Any] = MappingProxyType({})) -> ArgumentParser:
    """The parser, whose help shows the ``values`` of a preset as defaults."""
    usage = "[--preset NAME] [--config FILE] --base MODEL --train FILE [--method KIND ...] [--SETTING ...]"
    description = "Adapt a pretrained model to tasks, by one method or several."
    parser = command_parser("adapt", description, usage, print_config=None)
    presets = f"{', '.join(preset_names('adapt'))}; `torchdsc presets` says what each is for"

    def add(name: str, words: str, default: object = None, **options: Any) -> None:
        shown = "" if default is None else f" (default: {default})"
        # What is not given is not among the options: it is the preset's, the file's or the study's own.
        parser.add_argument(f"--{name}", default=SUPPRESS, help=words + shown, **options)

    add("preset", f"a study to start from: {presets}")
    add("config", "YAML file of a study, over the preset's")
    add("output", "folder of the study (default: runs/adapt-...)")
    add_dry_run(parser)
    add_print_config(parser)
    add("base", "folder or hub id of the model", values.get("base"))
    known = [method["name"] for method in values.get("methods", [])] or ["dsc"]
    add("method", f"methods: names of the study's, or {', '.join(KINDS)}", known, nargs="+")
    add("budget", f"trainable parameters of each adapter ({_DEFAULT_BUDGET:,} where new)", type=int)
    add("only", "names of the study's tasks to do, all by default", nargs="+")
    for kind, names, chosen in ((Task, _TASK_FLAGS, {}), (AdaptConfig, _STUDY_FLAGS, values)):
        described = {part.arg_name: part.description for part in docstring_parser.parse(kind.__doc__ or "").params}
        defaults = {f.name: None if f.default is MISSING else f.default for f in fields(kind)}
        defaults |= {f.name: f.default_factory() for f in fields(kind) if f.default_factory is not MISSING}
        for name in names:
            plural: dict[str, Any] = {"nargs": "+"} if name in _LISTS else {}
            add(name, described[name] or "", chosen.get(name, defaults[name]), **plural)
    return parser


def _config(flags: Mapping[str, Any]) -> AdaptConfig:
    names = ("config", "base", "method", "budget", "only", *_TASK_FLAGS, *_STUDY_FLAGS)
    options: dict[str, Any] = {name: flags.get(name) for name in names}
    values, _ = _values(flags)
    given = {name: options[name] for name in ("base", *_STUDY_FLAGS) if options[name] is not None}
    for name in set(given) - {"base"}:
        value = given[name]
        given[name] = [_value(name, item) for item in value] if isinstance(value, list) else _value(name, value)
    values |= check_fields(AdaptConfig, given)
    _single_task(values, options)
    _chosen_methods(values, options)
    missing = [flag for name, flag in (("base", "--base"), ("tasks", "--train")) if name not in values]
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be given where no preset or config does")
    with naming(options["config"]):
        return AdaptConfig.from_dict(values)


def _values(options: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Fields that the preset, and over it the file, give; and the folder that a file of --print_config names."""
    values: dict[str, Any] = {}
    preset, file, folder = options.get("preset"), options.get("config"), None
    if preset:
        values |= check_fields(AdaptConfig, read_preset(preset, "adapt"), f"preset {preset}")
    if file:
        read = read_yaml(Path(file))
        folder = check_folder(read.pop("output", None), file)
        values |= check_fields(AdaptConfig, read, file)
    return values, folder


def _single_task(values: dict[str, Any], options: dict[str, Any]) -> None:
    given = {name: options[name] for name in _TASK_FLAGS if options[name] is not None}
    if given and "train" not in given:
        raise ValueError(f"--train must be given with --{next(iter(given))}")
    if given:
        task: dict[str, Any] = {"name": Path(given["train"]).stem, **given}
        task |= {name: _value(name, given[name]) for name in ("max_train", "max_evaluation") if name in given}
        values["tasks"] = [build(Task, task)]
    if options["only"]:
        known = [task.name for task in values.get("tasks", [])]
        if set(options["only"]) - set(known):
            raise ValueError(f"only must name tasks of the study, {known}, got {options['only']}")
        values["tasks"] = [task for task in values["tasks"] if task.name in options["only"]]
        tuned = [name for name in values.get("tuning_tasks") or [] if name in options["only"]]
        values["tuning_tasks"] = tuned or None


def _chosen_methods(values: dict[str, Any], options: dict[str, Any]) -> None:
    known = {method.name: method for method in values.get("methods", [])}
    chosen = options["method"]
    if chosen is None and "methods" not in values:
        chosen = ["dsc"]
    if chosen is not None:
        methods = []
        for name in chosen:
            if name not in known and name not in KINDS:
                raise ValueError(f"method must be among {[*known, *KINDS]}, got {name!r}")
            budget = {} if name in WITHOUT_ADAPTER else {"budget": _DEFAULT_BUDGET}
            methods.append(known.get(name) or build(Method, {"name": name, "kind": name, **budget}))
        values["methods"] = methods
    if options["budget"] is not None:
        budget = check_fields(Method, {"budget": options["budget"]})
        values["methods"] = [
            method if method.kind in WITHOUT_ADAPTER else replace(method, **budget) for method in values["methods"]
        ]


def _value(name: str, given: Any) -> Any:
    """A flag's text as YAML has it."""
    return parse_yaml(given, f"--{name}") if isinstance(given, str) else given

"""``torchdsc adapt``."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import docstring_parser

from torchdsc.lab.adapt.config import KINDS, WITHOUT_ADAPTER, AdaptConfig, Method, Task
from torchdsc.lab.presets import preset_names, read_preset
from torchdsc.lab.schema import build, check_fields, naming, parse_yaml, read_yaml

from .parsing import ArgumentParser, command_parser

_TASK_FLAGS = [f.name for f in fields(Task) if f.name not in ("name", "steps")]
_STUDY_FLAGS = [f.name for f in fields(AdaptConfig) if f.name not in ("base", "tasks", "methods")]
_LISTS = ("text", "columns", "seeds", "learning_rates", "tuning_tasks")
# What --method takes beside the names of a preset's methods: a kind alone, at this budget.
_DEFAULT_BUDGET = 100_000


def run(arguments: list[str]) -> None:
    """Adapt a pretrained model to tasks, by one method or several."""
    options = _parser().parse_args(arguments)
    config = _config(vars(options))
    # Imported late: --help and wrong flags answer at once.
    from torchdsc.lab.adapt.study import adapt

    with naming(options.config):
        adapt(config, Path(options.output or f"runs/adapt-{options.preset or config.tasks[0].name}"))


def _parser() -> ArgumentParser:
    usage = "[--preset NAME] [--config FILE] --base MODEL --train FILE [--method KIND ...] [--SETTING VALUE ...]"
    parser = command_parser("adapt", "Adapt a pretrained model to tasks, by one method or several.", usage)
    presets = ", ".join(preset_names("adapt"))
    parser.add_argument("--preset", default=None, help=f"a study to start from: {presets}")
    parser.add_argument("--config", type=str | None, default=None, help="YAML file of a study, over the preset's")
    parser.add_argument("--output", type=str | None, default=None, help="folder of the study (default: runs/adapt-...)")
    parser.add_argument("--base", type=str | None, default=None, help="folder or hub id of the model")
    parser.add_argument(
        "--method", nargs="+", default=None, help=f"methods: names of the study's, or {', '.join(KINDS)}"
    )
    parser.add_argument(
        "--budget", type=int | None, default=None, help="trainable parameters of each adapter (100,000 where new)"
    )
    parser.add_argument("--only", nargs="+", default=None, help="names of the study's tasks to do, all by default")
    for kind, names in ((Task, _TASK_FLAGS), (AdaptConfig, _STUDY_FLAGS)):
        described = {part.arg_name: part.description for part in docstring_parser.parse(kind.__doc__ or "").params}
        for name in names:
            plural: dict[str, Any] = {"nargs": "+"} if name in _LISTS else {}
            parser.add_argument(f"--{name}", default=None, help=described[name], **plural)
    return parser


def _config(options: dict[str, Any]) -> AdaptConfig:
    values = _values(options)
    flags = {name: options[name] for name in ("base", *_STUDY_FLAGS) if options[name] is not None}
    for name in set(flags) - {"base"}:
        given = flags[name]
        flags[name] = [_value(name, item) for item in given] if isinstance(given, list) else _value(name, given)
    values |= check_fields(AdaptConfig, flags)
    _single_task(values, options)
    _chosen_methods(values, options)
    missing = [flag for name, flag in (("base", "--base"), ("tasks", "--train")) if name not in values]
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be given where no preset or config does")
    with naming(options["config"]):
        return AdaptConfig.from_dict(values)


def _values(options: dict[str, Any]) -> dict[str, Any]:
    """Fields that the preset, and over it the file, give."""
    values: dict[str, Any] = {}
    if options["preset"]:
        values |= check_fields(AdaptConfig, read_preset(options["preset"], "adapt"), f"preset {options['preset']}")
    if options["config"]:
        values |= check_fields(AdaptConfig, read_yaml(Path(options["config"])), options["config"])
    return values


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

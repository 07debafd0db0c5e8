"""``torchdsc adapt``."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import docstring_parser
import yaml

from torchdsc.lab.adapt.config import KINDS, WITHOUT_ADAPTER, AdaptConfig, Task
from torchdsc.lab.presets import preset_names, read_preset

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
    values = read_preset(options["preset"], "adapt") if options["preset"] else {}
    if options["config"]:
        values |= yaml.safe_load(Path(options["config"]).read_text(encoding="utf-8"))
    for name in ("base", *_STUDY_FLAGS):
        given = options[name]
        if given is not None:
            values[name] = [_value(item) for item in given] if isinstance(given, list) else _value(given)
    _single_task(values, options)
    _chosen_methods(values, options)
    missing = [flag for name, flag in (("base", "--base"), ("tasks", "--train")) if not values.get(name)]
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be given where no preset or config does")
    return AdaptConfig.from_dict(values)


def _single_task(values: dict[str, Any], options: dict[str, Any]) -> None:
    given = {name: options[name] for name in _TASK_FLAGS if options[name] is not None}
    if given and "train" not in given:
        raise ValueError(f"--train must be given with --{next(iter(given))}")
    if given:
        sized = {name: _value(given[name]) for name in ("max_train", "max_evaluation") if name in given}
        values["tasks"] = [{"name": Path(given["train"]).stem, **given, **sized}]
    if options["only"]:
        known = [task["name"] for task in values.get("tasks", [])]
        if set(options["only"]) - set(known):
            raise ValueError(f"only must name tasks of the study, {known}, got {options['only']}")
        values["tasks"] = [task for task in values["tasks"] if task["name"] in options["only"]]
        tuned = [name for name in values.get("tuning_tasks") or [] if name in options["only"]]
        values["tuning_tasks"] = tuned or None


def _chosen_methods(values: dict[str, Any], options: dict[str, Any]) -> None:
    known = {method["name"]: method for method in values.get("methods", [])}
    if options["method"] is None and not known:
        options = {**options, "method": ["dsc"]}
    if options["method"] is not None:
        methods = []
        for name in options["method"]:
            if name not in known and name not in KINDS:
                raise ValueError(f"method must be among {[*known, *KINDS]}, got {name!r}")
            budget = {} if name in WITHOUT_ADAPTER else {"budget": _DEFAULT_BUDGET}
            methods.append(known.get(name, {"name": name, "kind": name, **budget}))
        values["methods"] = methods
    if options["budget"] is not None:
        values["methods"] = [
            method if method["kind"] in WITHOUT_ADAPTER else {**method, "budget": options["budget"]}
            for method in values["methods"]
        ]


def _value(given: Any) -> Any:
    """A flag's text as YAML has it; numbers such as 2e-3 too, which YAML takes for text."""
    if not isinstance(given, str):
        return given
    try:
        return int(given) if given.isdecimal() else float(given)
    except ValueError:
        return yaml.safe_load(given)

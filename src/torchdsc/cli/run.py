"""``torchdsc run``."""

import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from torchdsc.lab.experiment.config import Experiment
from torchdsc.lab.experiment.presets import preset_names
from torchdsc.lab.experiment.values import merge, only_variants, read_experiment
from torchdsc.lab.schema import Model, SettingsError, build, parse_yaml
from torchdsc.lab.tasks import settings_type

from .parsing import SUPPRESS, ArgumentParser

_DEFAULT = "quick"
_OWN = ("output", "seeds", "variants", "cases", "dry_run", "print_config")
# A setting inside one that is a mapping: --feed_forward.aux_weight 0.001.
_NESTED = re.compile(r"--(\w+)\.([\w.]+)(?:=(.*))?")


def run(arguments: list[str]) -> int:
    """Run an experiment, or what is left of it; returns 1 if a run failed."""
    flat, nested = _take_nested(arguments)
    given = flat.pop(0) if flat and not flat[0].startswith("-") else None
    source = given or _DEFAULT
    values = read_experiment(source)
    kind = settings_type(values.get("task", "language_modelling"))
    parser = _parser(kind, values.get("settings") or {})
    _, rest = parser.parse_known_args(flat)
    if given is None and rest and not rest[0].startswith("-"):
        raise SettingsError(f"the experiment must come before all flags, got {rest[0]!r} after them")
    options = parser.parse_args(flat)
    experiment = _experiment(source, values, kind, options, nested)
    folder = Path(getattr(options, "output", f"runs/{Path(source).stem}"))
    if options.print_config:
        print(yaml.safe_dump(experiment.model_dump(), sort_keys=False, allow_unicode=True), end="")
        return 0
    # Imported late: --help and wrong flags answer at once.
    from torchdsc.lab.experiment.runner import dry_run
    from torchdsc.lab.experiment.runner import run as run_experiment

    if options.dry_run:
        dry_run(experiment, folder)
        return 0
    return 1 if run_experiment(experiment, folder).failed else 0


def _parser(kind: type[Model], values: Mapping[str, Any]) -> ArgumentParser:
    """The parser, with the settings of a task as flags; the help shows the experiment's ``values`` as defaults."""
    parser = ArgumentParser(
        "run",
        "Run an experiment, or what is left of it: variants of settings, over seeds, with a report. EXPERIMENT is a "
        f"YAML file, or one of {', '.join(preset_names())} (default: {_DEFAULT}).",
        usage="torchdsc run [EXPERIMENT] [--output FOLDER] [--SETTING VALUE ...]",
    )
    add = parser.add_argument
    add("--output", default=SUPPRESS, help="folder of the experiment (default: runs/EXPERIMENT)")
    add("--seeds", nargs="+", type=int, default=SUPPRESS, help="in place of the experiment's")
    add("--variants", nargs="+", default=SUPPRESS, help="names of those to run, all by default")
    add("--cases", nargs="+", default=SUPPRESS, help="names of those to run, all by default")
    add("--dry_run", action="store_true", help="say what would be done, its sizes and about how long it takes here")
    add("--print_config", action="store_true", help="print the experiment as YAML, with what the flags change")
    settings = parser.add_argument_group("settings of all runs, in place of the experiment's")
    for name, field in kind.model_fields.items():
        default = values.get(name, None if field.is_required() else field.get_default(call_default_factory=True))
        words = f"{field.description or ''} (default: {default})".replace("%", "%%")
        plural: dict[str, Any] = {"nargs": "+"} if _is_list(field.annotation) else {}
        settings.add_argument(f"--{name}", default=SUPPRESS, metavar="VALUE", help=words, **plural)
    return parser


def _experiment(
    source: str,
    values: dict[str, Any],
    kind: type[Model],
    options: Namespace,
    nested: Sequence[tuple[str, str, str]],
) -> Experiment:
    flags = {name: _value(kind, name, given) for name, given in vars(options).items() if name not in _OWN}
    for name, key, text in nested:
        if name not in kind.model_fields:
            raise SettingsError(f"--{name}.{key} must begin with a setting that is a mapping, got {name!r}")
        value = parse_yaml(text, f"--{name}.{key}")
        for part in reversed(key.split(".")):
            value = {part: value}
        flags = merge(flags, {name: value})
    if hasattr(options, "variants"):
        # Before they are checked: flags need not suit the others.
        values = only_variants(values, options.variants)
    values = _over_all(values, flags)
    if hasattr(options, "seeds"):
        values["seeds"] = options.seeds
        values["variants"] = [{k: v for k, v in item.items() if k != "seeds"} for item in values.get("variants", [])]
    experiment = build(Experiment, values, source if source.endswith((".yaml", ".yml")) else "")
    return experiment.part(cases=getattr(options, "cases", ()))


def _over_all(values: dict[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The experiment with settings of the command line, which win over those of cases and variants."""
    values = dict(values)
    for variant in values.get("variants") or []:
        clash = [name for trial in variant.get("trials") or [] for name in _shared(trial, flags)]
        if clash:
            raise SettingsError(f"--{clash[0]} must be left out: trials of variant {variant['name']!r} set it")
    values["settings"] = merge(values.get("settings") or {}, flags)
    values["trial_settings"] = _without(values.get("trial_settings") or {}, flags)
    if values.get("cases"):
        values["cases"] = {name: _without(case, flags) for name, case in values["cases"].items()}
    if isinstance(values.get("variants"), list):
        values["variants"] = [
            {**item, "settings": _without(item.get("settings") or {}, flags)} for item in values["variants"]
        ]
    return values


def _shared(values: Mapping[str, Any], flags: Mapping[str, Any], place: str = "") -> list[str]:
    found = []
    for name in values.keys() & flags.keys():
        if isinstance(values[name], dict) and isinstance(flags[name], dict):
            found += _shared(values[name], flags[name], f"{place}{name}.")
        else:
            found.append(place + name)
    return found


def _without(values: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in values.items():
        if isinstance(value, dict) and isinstance(flags.get(name), dict):
            kept[name] = _without(value, flags[name])
        elif name not in flags:
            kept[name] = value
    return kept


def _take_nested(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Arguments without settings inside mappings, and those."""
    flat, nested, rest = [], [], list(arguments)
    while rest:
        argument = rest.pop(0)
        found = _NESTED.fullmatch(argument)
        if found and (found[3] is not None or rest):
            nested.append((found[1], found[2], found[3] if found[3] is not None else rest.pop(0)))
        else:
            flat.append(argument)
    return flat, nested


def _value(kind: type[Model], name: str, given: str | list[str]) -> Any:
    """A flag's text as YAML has it; where the setting is text, as it is, but for "null" where it may be nothing."""
    if isinstance(given, list):
        if len(given) == 1 and given[0].startswith("["):
            return parse_yaml(given[0], f"--{name}")
        return [_value(kind, name, item) for item in given]
    hint = kind.model_fields[name].annotation
    is_nothing = given == "null" and type(None) in get_args(hint)
    return given if _is_text(hint) and not is_nothing else parse_yaml(given, f"--{name}")


def _is_text(hint: Any) -> bool:
    """Whether a setting, or an item of it, may be text."""
    parts = get_args(hint)
    if get_origin(hint) is list:
        return _is_text(parts[0])
    return hint is str or get_origin(hint) is Literal or (get_origin(hint) is not dict and any(map(_is_text, parts)))


def _is_list(hint: Any) -> bool:
    return get_origin(hint) is list or any(map(_is_list, get_args(hint)))

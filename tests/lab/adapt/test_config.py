import pytest

from torchdsc.lab.adapt.config import AdaptConfig, Task, resolve_base
from torchdsc.lab.presets import preset_names, read_preset
from torchdsc.lab.schema import SettingsError

TASK = {"name": "t", "train": "a.tsv"}
METHOD = {"name": "m", "kind": "dsc"}


@pytest.mark.parametrize("name", preset_names("adapt"))
def test_presets_are_configurations(name):
    config = AdaptConfig.from_dict(read_preset(name, "adapt"))
    assert AdaptConfig.from_dict(config.as_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": []}, r"^tasks must have at least 1 item.*, got \[\]$"),
        ({"tasks": 5}, "^tasks must be a list, got 5$"),
        ({"tasks": None}, "^tasks must be a list, got nothing$"),
        ({"tasks": [5]}, r"^tasks\[0\] must be a mapping, got 5$"),
        ({"tasks": [TASK, TASK]}, r"^tasks must have different names, got \['t', 't'\]$"),
        ({"tasks": [{**TASK, "columns": 5}]}, r"^tasks\['t'\].columns must be a list, got 5$"),
        (
            {"tasks": [{**TASK, "columns": ["a", "a"]}]},
            r"^tasks\['t'\].columns must be different values, got \['a', 'a'\]",
        ),
        ({"tasks": [{**TASK, "max_train": 1.5}]}, r"^tasks\['t'\].max_train must be an integer, got 1.5$"),
        ({"tasks": [{**TASK, "max_train": 0}]}, r"^tasks\['t'\].max_train must be greater than or equal to 1, got 0$"),
        ({"tasks": [{**TASK, "metric": "bleu"}]}, r"^tasks\['t'\].metric must be 'accuracy', .*, got 'bleu'$"),
        (
            {"tasks": [{**TASK, "kind": "regression", "metric": "f1"}]},
            r"\['t'\]: metric .* kind = 'regression', got 'f1'$",
        ),
        (
            {"tasks": [{**TASK, "kind": "causal_lm", "text": ["a", "b"]}]},
            r"text must be one column .*, got \['a', 'b'\]$",
        ),
        ({"tasks": [{**TASK, "text": []}]}, r"^tasks\['t'\].text must have at least 1 item"),
        ({"tasks": [{**TASK, "text": "review"}]}, r"^tasks\['t'\].text must be a list, got 'review'$"),
        ({"tasks": [{**TASK, "retain": "b.txt"}]}, "retain must be None for kind = 'classification', got 'b.txt'$"),
        (
            {"tasks": [{**TASK, "colour": 1}]},
            r"^tasks\['t'\].colour must be one of the fields name, .*, steps, got 'colour'$",
        ),
        ({"methods": 5}, "^methods must be a list, got 5$"),
        ({"methods": [METHOD, METHOD]}, r"^methods must have different names, got \['m', 'm'\]$"),
        ({"methods": [{"name": "m", "kind": "lora2"}]}, r"^methods\['m'\].kind must be 'dsc', .*, got 'lora2'$"),
        ({"methods": [{"name": "m", "kind": ["dsc"]}]}, r"^methods\['m'\].kind must be 'dsc', .*, got \['dsc'\]$"),
        (
            {"methods": [{"name": "m", "kind": "full", "budget": 3}]},
            r"^methods\['m'\]: budget and options must be left out",
        ),
        ({"methods": [{"name": "m", "kind": "head", "options": {"r": 2}}]}, "budget and options must be left out"),
        ({"methods": [{"kind": "full"}]}, r"^methods\[0\] must have name, got \{'kind': 'full'\}$"),
        ({"methods": [{**METHOD, "name": 5}]}, r"^methods\[0\].name must be text, got 5$"),
        ({"methods": [{**METHOD, "options": 5}]}, r"^methods\['m'\].options must be a mapping, got 5$"),
        ({"methods": [{**METHOD, "budget": "many"}]}, r"^methods\['m'\].budget must be an integer, got 'many'$"),
        ({"methods": [{**METHOD, "learning_rates": [-1.0]}]}, r"learning_rates\[0\] must be greater than 0, got -1.0$"),
        ({"methods": [{**METHOD, "learning_rates": []}]}, r"^methods\['m'\].learning_rates must have at least 1 item"),
        ({"methods": [{**METHOD, "seeds": [2, 2]}]}, r"^methods\['m'\].seeds must be different values, got \[2, 2\]$"),
        ({"methods": [{**METHOD, "against": "x"}]}, r"^against of method 'm' must be .* a method, \['m'\], got 'x'$"),
        ({"base": 5}, "^base must be text, got 5$"),
        ({"base": None}, "^base must be text, got nothing$"),
        ({"base_options": [1]}, r"^base_options must be a mapping, got \[1\]$"),
        ({"learning_rates": ["1e-3"]}, r"^learning_rates\[0\] must be a number, got '1e-3'$"),
        ({"learning_rates": [float("inf")]}, r"^learning_rates\[0\] must be a finite number, got inf$"),
        ({"learning_rates": [float("nan")]}, r"^learning_rates\[0\] must be a finite number, got nan$"),
        ({"head_learning_rate": 0.0}, "^head_learning_rate must be greater than 0, got 0.0$"),
        ({"seeds": 3}, "^seeds must be a list, got 3$"),
        ({"seeds": [1.5]}, r"^seeds\[0\] must be an integer, got 1.5$"),
        ({"seeds": [True]}, r"^seeds\[0\] must be an integer, got True$"),
        ({"seeds": [-1]}, r"^seeds\[0\] must be greater than or equal to 0, got -1$"),
        ({"seeds": [1, 1]}, r"^seeds must be different values, got \[1, 1\]$"),
        ({"tuning_tasks": ["x"]}, r"^tuning_tasks must be among \['t'\], got \['x'\]$"),
        ({"batch_size": 6, "accumulation": 4}, "^accumulation must divide batch_size = 6, got 4$"),
        ({"warmup_steps": 500}, "^warmup_steps must be in 0 .. steps = 200, got 500$"),
        ({"steps": 2.5}, "^steps must be an integer, got 2.5$"),
        ({"steps": "none"}, "^steps must be an integer, got 'none'$"),
        ({"weight_decay": "none"}, "^weight_decay must be a number, got 'none'$"),
        ({"precision": "fp8"}, "^precision must be 'fp32' or 'bf16', got 'fp8'$"),
        ({"reference": "x"}, r"^reference must be the name of a method, \['m'\], got 'x'$"),
        ({"stepz": 3}, "^stepz must be one of the fields base, .*, got 'stepz'$"),
    ],
)
def test_errors_name_the_field(changes, message):
    with pytest.raises(SettingsError, match=message):
        AdaptConfig.from_dict({"base": "b", "tasks": [TASK], "methods": [METHOD], **changes})


def test_missing_field():
    with pytest.raises(SettingsError, match=r"^base must be given, got tasks, methods$"):
        AdaptConfig.from_dict({"tasks": [TASK], "methods": [METHOD]})


def test_objects_are_checked_as_well():
    with pytest.raises(ValueError, match=r"max_train\n.*greater than or equal to 1"):
        Task("t", "a", max_train=0)


def test_metric_follows_the_kind():
    assert [Task("t", "a", kind=kind).scored_by for kind in ("classification", "regression", "causal_lm")] == [
        "accuracy",
        "correlation",
        "loss",
    ]


def test_base_in_a_package():
    assert resolve_base("package:torchdsc/configs").endswith("torchdsc/configs")
    assert resolve_base("some/id") == "some/id"
    with pytest.raises(ValueError, match="base must name an installed package, got 'package:no_such/x'"):
        resolve_base("package:no_such/x")


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset must be one of"):
        read_preset("none", "adapt")

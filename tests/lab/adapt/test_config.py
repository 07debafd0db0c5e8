import pytest

from torchdsc.lab.adapt.config import AdaptConfig, Task, resolve_base
from torchdsc.lab.presets import preset_names, read_preset

TASK = {"name": "t", "train": "a.tsv"}
METHOD = {"name": "m", "kind": "dsc"}


@pytest.mark.parametrize("name", preset_names("adapt"))
def test_presets_are_configurations(name):
    config = AdaptConfig.from_dict(read_preset(name, "adapt"))
    assert AdaptConfig.from_dict(config.as_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": []}, "tasks must be one or more of different names"),
        ({"methods": [METHOD, METHOD]}, "methods must be one or more of different names"),
        ({"methods": [{"name": "m", "kind": "lora2"}]}, "kind of method 'm' must be one of"),
        ({"methods": [{"name": "m", "kind": "full", "budget": 3}]}, "must have no budget"),
        ({"methods": [{"kind": "full"}]}, "methods: missing 1 required .*'name'"),
        ({"tasks": [{**TASK, "metric": "bleu"}]}, "metric of task 't' must be"),
        ({"tasks": [{**TASK, "kind": "regression", "metric": "accuracy"}]}, "for kind = 'regression', got 'accuracy'"),
        ({"methods": [{**METHOD, "learning_rates": [-1.0]}]}, "learning_rates of method 'm' must be > 0, got -1.0"),
        ({"methods": [{**METHOD, "learning_rates": []}]}, "learning_rates of method 'm' must be one or more"),
        ({"learning_rates": ["1e-3"]}, r"learning_rates must be one or more different numbers, got \['1e-3'\]"),
        ({"methods": [{**METHOD, "seeds": [2, 2]}]}, "seeds of method 'm' must be one or more different numbers"),
        ({"head_learning_rate": 0.0}, "head_learning_rate must be > 0, got 0.0"),
        ({"methods": [{"name": "m", "kind": "head", "options": {"r": 2}}]}, "must have no budget and options"),
        ({"seeds": 3}, "seeds must be one or more different numbers, got 3"),
        ({"tasks": [{**TASK, "text": []}]}, "text of task 't' must be one or two columns"),
        ({"tasks": [{**TASK, "retain": "b.txt"}]}, "retain of task 't' must be None for kind = 'classification'"),
        ({"tasks": [{**TASK, "colour": 1}]}, r"tasks must set fields of Task, got \['colour'\]"),
        ({"tuning_tasks": ["x"]}, r"tuning_tasks must be among \['t'\], got \['x'\]"),
        ({"learning_rates": [0.0]}, "learning_rates must be > 0, got 0.0"),
        ({"seeds": [1, 1]}, "seeds must be one or more different numbers"),
        ({"batch_size": 6, "accumulation": 4}, "accumulation must divide batch_size = 6, got 4"),
        ({"warmup_steps": 500}, "warmup_steps must be in 0 .. steps = 200, got 500"),
        ({"steps": "none"}, "steps must be an int >= 1, got 'none'"),
        ({"weight_decay": "none"}, "weight_decay must be a number, got 'none'"),
        ({"precision": "fp8"}, "precision must be fp32 or bf16, got 'fp8'"),
        ({"reference": "x"}, "reference must be the name of a method, got 'x'"),
        ({"methods": [{**METHOD, "against": "x"}]}, "against of method 'm' must be the name of a method, got 'x'"),
        ({"stepz": 3}, r"config must set fields of AdaptConfig, got \['stepz'\]"),
    ],
)
def test_errors_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        AdaptConfig.from_dict({"base": "b", "tasks": [TASK], "methods": [METHOD], **changes})


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

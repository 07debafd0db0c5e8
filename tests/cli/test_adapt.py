"""``torchdsc adapt``: what its flags make of a study."""

import pytest
import yaml

from torchdsc.cli.adapt import _config, _parser
from torchdsc.cli.main import main
from torchdsc.lab.adapt.config import AdaptConfig
from torchdsc.lab.presets import read_preset


def parse(*arguments):
    return _config(vars(_parser().parse_args([str(argument) for argument in arguments])))


def test_preset():
    assert parse("--preset", "glue") == AdaptConfig.from_dict(read_preset("glue", "adapt"))


def test_flags_over_the_preset():
    config = parse(
        "--preset", "glue", "--seeds", 3, 4, "--steps", 70, "--learning_rates", "2e-3", "--only", "RTE", "SST-2"
    )
    assert (config.seeds, config.steps, config.learning_rates) == ([3, 4], 70, [2e-3])
    assert [task.name for task in config.tasks] == ["SST-2", "RTE"]


def test_file_over_the_preset(tmp_path):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"steps": 90}))
    assert parse("--preset", "glue", "--config", tmp_path / "s.yaml").steps == 90


def test_single_task():
    config = parse(
        *("--base", "some/model", "--train", "data/reviews.tsv", "--text", "title", "body", "--label", "stars"),
        *("--kind", "regression", "--max_train", 100, "--method", "dsc", "lora", "full", "--budget", 5000),
    )
    (task,) = config.tasks
    assert (task.name, task.text, task.label, task.kind, task.max_train) == (
        "reviews", ["title", "body"], "stars", "regression", 100
    )  # fmt: skip
    assert [(method.name, method.kind, method.budget) for method in config.methods] == [
        ("dsc", "dsc", 5000), ("lora", "lora", 5000), ("full", "full", None)
    ]  # fmt: skip


def test_dsc_is_the_method_where_none_is_given():
    (method,) = parse("--base", "b", "--train", "a.csv").methods
    assert (method.kind, method.budget) == ("dsc", 100_000)


def test_methods_of_a_preset_by_name():
    methods = parse("--preset", "glue", "--method", "LoRA 8", "dsc").methods
    assert [method.name for method in methods] == ["LoRA 8", "dsc"]
    assert methods[0].options["r"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--base and --train must be given"),
        (("--base", "b"), "--train must be given"),
        (("--label", "x", "--base", "b"), "--train must be given with --label"),
        (("--base", "b", "--train", "a.csv", "--method", "x"), "method must be among"),
        (("--preset", "glue", "--only", "x"), "only must name tasks of the study"),
        (("--preset", "none"), "preset must be one of"),
        (("--base", "b", "--train", "a.csv", "--steps", "0"), "steps must be greater than or equal to 1, got 0"),
        (("--colour", "red"), "colour"),
    ],
)
def test_errors_in_a_line(arguments, message, capsys):
    assert main(["adapt", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit):
        main(["adapt", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for word in ("that is held out for it", "Trials of a method", "names of the study's"):
        assert word in shown

"""Dispatch, help, and errors of the user in one line."""

import subprocess
import sys

import pytest

import torchdsc as package
from torchdsc.cli import main as cli_main
from torchdsc.lab.experiment.presets import preset_names
from torchdsc.lab.experiment.values import read_experiment

COMMANDS = ("run", "report", "presets", "budget", "inspect", "generate", "serve", "bench")


class TestHelp:
    @pytest.mark.parametrize("flag", ["-h", "--help"])
    def test_overview(self, torchdsc, flag):
        status, out, err = torchdsc(flag)
        assert (status, err) == (0, "")
        assert all(f"\n  {command} " in out for command in COMMANDS)
        assert len(out.splitlines()) < 15

    def test_without_a_command(self, torchdsc):
        status, out, _ = torchdsc()
        assert status == 2
        assert out == torchdsc("--help").out

    @pytest.mark.parametrize("command", COMMANDS)
    def test_of_a_command(self, torchdsc, command):
        status, out, err = torchdsc(command, "--help")
        assert (status, err) == (0, "")
        assert out.split()[:3] == ["usage:", "torchdsc", command]
        usage = out.partition("\n\n")[0]
        assert len(usage.splitlines()) <= 7
        assert max(map(len, usage.splitlines())) <= 120

    def test_version(self, torchdsc):
        assert torchdsc("--version") == (0, f"torchdsc {package.__version__}\n", "")

    def test_presets_are_listed_with_what_each_is_for(self, torchdsc):
        status, out, err = torchdsc("presets")
        assert (status, err) == (0, "")
        for name in preset_names():
            assert f"{name} {read_experiment(name)['title']}" in " ".join(out.split())

    def test_as_a_module(self):
        done = subprocess.run([sys.executable, "-m", "torchdsc", "--version"], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"torchdsc {package.__version__}\n", "")

    @pytest.mark.parametrize(
        ("arguments", "status"),
        [
            *((["--help"], 0), (["--version"], 0), (["nonsense"], 2)),
            *(([command, "--help"], 0) for command in COMMANDS),
            *((["run", "--foo", "1"], 2), (["run", "glue", "--stepz", "1"], 2), (["budget", "--total", "much"], 2)),
            *(([command, "nowhere"], 2) for command in ("report", "inspect", "generate", "serve", "bench")),
            (["serve", ".", "--port", "70000"], 2),
        ],
    )
    def test_help_and_wrong_arguments_are_answered_without_torch(self, arguments, status):
        script = (
            f"import sys, runpy; sys.argv = ['torchdsc', *{arguments}]\n"
            "try: runpy.run_module('torchdsc', run_name='__main__')\n"
            f"except SystemExit as leave: assert leave.code == {status}, leave.code\n"
            "assert not {'torch', 'transformers'} & set(sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


class TestErrors:
    def test_unknown_command(self, fails):
        known = "torchdsc: command must be one of run, report, presets, budget, inspect, generate, serve, bench"
        assert fails("repor") == f"{known}, got 'repor' (did you mean report?)"
        assert fails("xyz") == f"{known}, got 'xyz'"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["run", "--xyz", "3"], "unrecognized arguments: --xyz 3 (see torchdsc run --help)"),
            (["run", "--stepps", "3"], "unrecognized arguments: --stepps 3 (did you mean --steps?) (see torchdsc"),
            # Nothing is abbreviated: what it stood for could change with a new flag.
            (["run", "--step", "3"], "unrecognized arguments: --step 3 (did you mean --steps?) (see torchdsc"),
            (["run", "--seeds", "1", "quick"], "--seeds must be an integer, got 'quick' (see"),
            (["run", "--dry-run", "quick"], "the experiment must come before all flags, got 'quick' after them"),
            (["run", "quick", "x"], "unrecognized arguments: x (see torchdsc run --help)"),
            (
                ["run", "smal"],
                f"experiment must be a YAML file or one of {', '.join(preset_names())}, got 'smal' (did y",
            ),
            (["run", "nowhere.yaml"], "No such file or directory: nowhere.yaml"),
            (["run", "--steps", "abc"], "settings of variant 'Dense': steps must be an integer, got 'abc'"),
            (["run", "--steps"], "argument --steps: expected one argument (see"),
            (["run", "--precision", "fp8"], "settings of variant 'Dense': precision must be 'fp32', 'bf16' or 'fp16'"),
            (["run", "--seeds", "1", "b"], "--seeds must be an integer, got 'b' (see"),
            (["run", "--seeds", "1", "1"], "seeds must be different values, got [1, 1]"),
            (["run", "--variants", "MoE"], "variants must be among those of the experiment, ['Dense', "),
            (["run", "--cases", "x"], "cases must be among those of the experiment, [''], got 'x'"),
            (["run", "--feed_forward", "{a: "], "--feed_forward must be YAML, got at line 1"),
            (["run", "--stepz.x", "1"], "--stepz.x must begin with a setting that is a mapping, got 'stepz'"),
            (
                ["run", "--corpus", "nowhere/text.txt"],
                "corpus must be one of embedded, wikitext-2, wikitext-103, or a path to text files, "
                "got a path that is not there: nowhere/text.txt",
            ),
            (["run", "adapt"], "settings of variant 'LoRA': base must be given, got ['budget', 'method', "),
            (
                ["run", "glue", "--learning_rate", "3"],
                "--learning_rate must be left out: trials of variant 'LoRA 8' set",
            ),
            (["report", "nowhere"], "No such file or directory: nowhere"),
            (["report", "."], "No such file or directory: results.json"),
            (["serve", ".", "--port", "70000"], "argument --port: must be 1 to 65535, got '70000' (see"),
            (["serve", ".", "--port", "http"], "argument --port: must be 1 to 65535, got 'http' (see"),
            (["generate"], "the following arguments are required: model (see torchdsc generate --help)"),
            (["generate", "nowhere"], "No such file or directory: nowhere"),
            (["generate", "."], "no model in .: a folder of a model has config.json"),
            (["inspect", ".", "--text", "nowhere.txt"], "No such file or directory: nowhere.txt"),
            (["generate", ".", "--temperature", "warm"], "--temperature must be a number, got 'warm' (see"),
            (["generate", ".", "--top-pp", "3"], "unrecognized arguments: --top_pp 3 (did you mean --top_p?) (see"),
            (["budget", "--total", "1e6"], "the following arguments are required: --active, --d_model, --n_layer (see"),
        ],
    )
    @pytest.mark.usefixtures("workplace")
    def test_are_one_line(self, torchdsc, arguments, message):
        status, _, err = torchdsc(*arguments)
        assert status == 2
        assert err.startswith(f"torchdsc {arguments[0]}: {message}")
        assert err.count("\n") == 1
        assert "Traceback" not in err

    def test_settings_in_a_file_name_it(self, fails, workplace):
        (workplace / "a.yaml").write_text("variants: [{name: a, settings: {stepps: 3}}]")
        line = fails("run", "a.yaml")
        assert line.startswith("torchdsc run: a.yaml: settings of variant 'a': stepps must be one of the fields")
        assert line.endswith("got 'stepps' (did you mean steps?)")

    def test_failure_leaves_no_folder(self, torchdsc, workplace):
        status, _, err = torchdsc("run", "--corpus", "nosuch", "--output", "some/where")
        assert (status, list(workplace.iterdir())) == (2, [])
        assert err.startswith("torchdsc run: corpus must be one of embedded, ")

    def test_hub_corpus_without_the_extra_names_it(self, torchdsc, workplace, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        err = torchdsc("run", "small").err
        assert "pip install 'torchdsc[corpora]', or give other files" in err

    def test_of_the_system_name_the_file(self, torchdsc, tiny):
        # A folder under a file cannot be made, by nobody.
        status, _, err = torchdsc("run", tiny, "--output", tiny / "out")
        assert (status, err) == (2, f"torchdsc run: Not a directory: {tiny / 'out'}\n")

    @pytest.mark.parametrize("command", COMMANDS)
    def test_ctrl_c(self, torchdsc, monkeypatch, command):
        def interrupt(arguments):
            raise KeyboardInterrupt

        module = type(sys)(command)
        module.run = interrupt
        monkeypatch.setattr(cli_main, "import_module", lambda name: module)
        status, out, err = torchdsc(command)
        assert (status, out) == (1, "")
        further = "; the same command goes on from what is saved" if command == "run" else ""
        assert err == f"\ntorchdsc {command}: interrupted{further}\n"

    def test_bugs_keep_their_traceback(self, torchdsc, monkeypatch):
        def fail(arguments):
            raise AssertionError("a bug")

        module = type(sys)("budget")
        module.run = fail
        monkeypatch.setattr(cli_main, "import_module", lambda name: module)
        with pytest.raises(AssertionError, match="a bug"):
            torchdsc("budget")


def test_a_reader_that_has_gone_is_no_error():
    command = [sys.executable, "-m", "torchdsc", "presets"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == ("", 1)

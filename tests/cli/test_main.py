"""Dispatch, help, and errors of the user in one line."""

import re
import subprocess
import sys

import pytest

import torchdsc as package
from torchdsc.cli import main as cli_main
from torchdsc.lab import presets as package_presets
from torchdsc.lab.config import preset_names

COMMANDS = ("compare", "budget", "train", "generate", "adapt", "study", "presets", "bench")
RESUMABLE = ("compare", "train", "adapt", "study")


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
        assert len(usage.splitlines()) <= 6
        assert max(map(len, usage.splitlines())) <= 120

    def test_version(self, torchdsc):
        assert torchdsc("--version") == (0, f"torchdsc {package.__version__}\n", "")

    def test_presets_are_listed_with_what_each_is_for(self, torchdsc):
        status, out, err = torchdsc("presets")
        assert (status, err) == (0, "")
        for folder in ((), ("adapt",), ("study",)):
            for name in package_presets.preset_names(*folder):
                purpose = package_presets.describe_preset(name, *folder)
                assert len(purpose) > 40
                assert f"{name} {purpose}" in " ".join(out.split())
        # The extra that they need beside the lab's.
        for name in ("small", "best", "paper"):
            assert "the extra corpora" in package_presets.describe_preset(name)

    def test_of_train_lists_nothing_that_it_refuses(self, torchdsc):
        assert not {"--methods", "--seeds"} & set(torchdsc("train", "--help").out.split())

    @pytest.mark.parametrize("command", COMMANDS)
    def test_has_no_default_that_says_nothing(self, torchdsc, command):
        out = " ".join(torchdsc(command, "--help").out.split())
        for flag in ("output", "base", "rounds", "preset", "config", "metric", "seeds", "names"):
            shown = re.search(rf" --{flag} .*? (?=--|$)", out)
            assert not shown or "default: null" not in shown[0]

    def test_as_a_module(self):
        done = subprocess.run([sys.executable, "-m", "torchdsc", "--version"], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, f"torchdsc {package.__version__}\n", "")

    def test_as_a_module_without_loading_transformers(self):
        script = (
            "import sys, runpy; sys.argv = ['torchdsc', 'compare', '--help']\n"
            "try: runpy.run_module('torchdsc.cli', run_name='__main__')\n"
            "except SystemExit as leave: assert not leave.code\n"
            "assert 'transformers' not in sys.modules"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("usage: torchdsc compare")


class TestErrors:
    def test_unknown_command(self, fails):
        known = "torchdsc: command must be one of compare, budget, train, generate, adapt, study, presets, bench"
        assert fails("comparr") == f"{known}, got 'comparr' (did you mean compare?)"
        assert fails("xyz") == f"{known}, got 'xyz'"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["compare", "--xyz", "3"], "unrecognized arguments: --xyz 3 (see torchdsc compare --help)"),
            (["compare", "--stepps", "3"], "unrecognized arguments: --stepps 3 (did you mean --steps?) (see torchdsc"),
            # Nothing is abbreviated: what it stood for could change with a new flag.
            (["compare", "--step", "3"], "unrecognized arguments: --step 3 (did you mean --steps?) (see torchdsc"),
            (
                ["adapt", "--learning-rate", "3"],
                "unrecognized arguments: --learning_rate 3 (did you mean --learning_rates?",
            ),
            (["generate", "x", "--top-pp", "3"], "unrecognized arguments: --top_pp 3 (did you mean --top_p?) (see"),
            (
                ["compare", "--preset", "smal"],
                f"preset must be one of {preset_names()}, got 'smal' (did you mean small?)",
            ),
            (["study", "--preset", "lever"], "preset must be one of ['length', "),
            (["study", "--preset", "opponent"], "preset must be one of ['length', 'levers', 'longer', 'opponents', "),
            (["compare", "--steps", "abc"], "steps must be int, got abc (see torchdsc compare --help)"),
            (["compare", "--steps"], "argument --steps: expected one argument (see"),
            (["compare", "--precision", "fp8"], "precision must be one of 'fp32', 'bf16', 'fp16', got fp8 (see"),
            (["compare", "--seeds", "1", "b"], "seeds must be int, got b (see"),
            (["compare", "--seeds", "1", "1"], "seeds must be one or more different integers, got [1, 1]"),
            (
                ["compare", "--methods", "dsc", "lora"],
                "methods must be among dense, moe, mixture_of_loras, peer, dsc, got lora",
            ),
            (["compare", "--preset", "tiny"], f"preset must be one of {preset_names()}, got 'tiny'"),
            (["compare", "--config", "nowhere.yaml"], "config: File does not exist"),
            (["compare", "--learning_rate=-1"], "learning_rate must be > 0, got -1.0"),
            (
                ["compare", "--corpus", "nowhere/text.txt"],
                "corpus must be one of ['embedded', 'wikitext-2', 'wikitext-103'], or a path to text files, "
                "got a path that is not there: nowhere/text.txt",
            ),
            (["train", "--method", "lora"], "argument --method: invalid choice: 'lora' (choose from"),
            (["train", "--methods", "dsc"], "train takes one --method and one --seed, got --methods"),
            (["train", "--seeds=[3]"], "train takes one --method and one --seed, got --seeds=[3]"),
            (["train", "--seed", "-1"], "seeds must be in 0 .. 2^32 - 1, got -1"),
            (["generate"], "the following arguments are required: model (see torchdsc generate --help)"),
            (["generate", "nowhere"], "no model in nowhere: a run's folder holds model/config.json"),
            (["generate", "nowhere", "--temperature", "warm"], "temperature must be float, got warm (see"),
            (["budget", "--total", "1e6"], "the following arguments are required: active, d_model, n_layer (see"),
        ],
    )
    @pytest.mark.usefixtures("workplace")
    def test_are_one_line(self, torchdsc, arguments, message):
        status, _, err = torchdsc(*arguments)
        assert status == 2
        assert err.startswith(f"torchdsc {arguments[0]}: {message}")
        assert err.count("\n") == 1
        assert "Traceback" not in err

    def test_unknown_setting_in_a_file(self, fails, tmp_path):
        (tmp_path / "a.yaml").write_text("stepps: 3")
        line = fails("compare", "--config", tmp_path / "a.yaml")
        assert line.startswith("torchdsc compare: Option 'stepps' is not accepted (did you mean steps?) (see")

    @pytest.mark.parametrize("command", ["compare", "train"])
    def test_failure_leaves_no_folder(self, torchdsc, workplace, command):
        status, _, err = torchdsc(command, "--corpus", "nosuch", "--output", "some/where")
        assert (status, list(workplace.iterdir())) == (2, [])
        assert err.startswith(f"torchdsc {command}: corpus must be one of ['embedded', ")

    def test_hub_corpus_without_the_extra_names_it(self, torchdsc, workplace, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        err = torchdsc("compare", "--preset", "small").err
        assert "pip install 'torchdsc[corpora]', or give a folder with its files" in err

    def test_of_the_system_name_the_file(self, torchdsc, tiny):
        # A folder under a file cannot be made, by nobody.
        status, _, err = torchdsc("compare", "--config", tiny, "--output", tiny / "out")
        assert (status, err) == (2, f"torchdsc compare: Not a directory: {tiny / 'out'}\n")

    @pytest.mark.parametrize("command", COMMANDS)
    def test_ctrl_c(self, torchdsc, monkeypatch, command):
        def interrupt(arguments):
            raise KeyboardInterrupt

        module = type(sys)(command)
        module.run = interrupt
        monkeypatch.setattr(cli_main, "import_module", lambda name: module)
        status, out, err = torchdsc(command)
        assert (status, out) == (1, "")
        further = "; the same command goes on from what is saved" if command in RESUMABLE else ""
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

import pytest

from torchdsc.lab.schema import SettingsError, build
from torchdsc.lab.tasks.adaptation.base import resolve_base
from torchdsc.lab.tasks.adaptation.settings import Settings

CAUSAL = {"kind": "causal_lm"}
ANSWERS = {"0": " no", "1": " yes"}
PROMPTED = {"kind": "prompted", "prompt": "{text}", "answers": ANSWERS}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "bleu"}, "^metric must be 'accuracy', .*, got 'bleu'$"),
        ({"kind": "regression", "metric": "f1"}, "^metric must be one of .* for kind = 'regression', got 'f1'$"),
        ({"retain": "b.txt"}, "^retain must be left out for kind = 'classification', got 'b.txt'$"),
        ({**CAUSAL, "retain": ["b.txt", "b.txt"]}, r"^retain must be .* all different, got \['b.txt', 'b.txt'\]$"),
        ({**CAUSAL, "retain": []}, r"^retain must be one text or more, all different, got \[\]$"),
        ({**CAUSAL, "choices": 4}, "^choices must be left out without retain, got 4$"),
        ({**CAUSAL, "replay": 0.05}, "^replay must be left out without retain, got 0.05$"),
        ({**CAUSAL, "quiet": 0.1}, "^quiet must be 0 but for DSC with router_input = 'embeddings', got 0.1$"),
        (
            {**CAUSAL, "quiet": 0.1, "options": {"router_input": "embeddings"}},
            "^quiet must be left out without retain, got 0.1$",
        ),
        (
            {"update_scale": 0.5, "options": {"modules_to_save": ["lm_head"]}},
            r"^options must not set modules_to_save for update_scale, got \['lm_head'\]$",
        ),
        (
            {"method": "lora", "update_scale": 0.5, "options": {"init_lora_weights": "pissa"}},
            "^options must not set init_lora_weights for update_scale, got 'pissa'$",
        ),
        ({"method": "vera", "update_scale": 0.5}, "^update_scale must be left out for method = 'vera', got 0.5$"),
        (
            {"method": "lora", "options": {"use_dora": True}, "also_scaled": [0.5]},
            r"^also_scaled must be left out for method = 'lora' with DoRA, got \[0.5\]$",
        ),
        ({"method": "miss", "also_scaled": [0.5]}, r"^also_scaled must be left out for method = 'miss', got \[0.5\]$"),
        ({"also_scaled": [1.0]}, r"^also_scaled\[0\] must be less than 1, got 1.0$"),
        ({"also_scaled": [0.5, 0.5]}, r"^also_scaled must be different values, got \[0.5, 0.5\]$"),
        (
            {"update_scale": 0.5, "also_scaled": [0.25, 0.5]},
            r"^also_scaled must be below update_scale = 0.5, got \[0.25, 0.5\]$",
        ),
        (
            {"also_scaled": [0.5], "options": {"modules_to_save": ["lm_head"]}},
            r"^options must not set modules_to_save for also_scaled, got \['lm_head'\]$",
        ),
        ({"max_retained": 4}, "^max_retained must be left out for kind = 'classification', got 4$"),
        ({**CAUSAL, "max_retained": 4}, "^max_retained must be left out without retain, got 4$"),
        ({"prompt": "{text}"}, "^prompt must be left out for kind = 'classification', got '{text}'$"),
        ({"kind": "prompted", "answers": ANSWERS}, "^prompt must be given for kind = 'prompted', got None$"),
        ({"kind": "prompted", "prompt": "{text}"}, "^answers must be given for kind = 'prompted', got None$"),
        ({**PROMPTED, "answers": {"0": "a"}}, "^answers must be two or more, all different, got {'0': 'a'}$"),
        ({**PROMPTED, "answers": {"0": "a", "1": "a"}}, "^answers must be two or more, all different"),
        ({**PROMPTED, "prompt": "{text"}, "^prompt must be a text with columns in braces, got '{text': expected '}'"),
        (
            {**PROMPTED, "prompt": "{label}"},
            r"^prompt must have each column of text, \['text'\], in braces, got '{label}'$",
        ),
        ({**PROMPTED, "prompt": r"{text}\nIs it?"}, r"^prompt must have a line break where it has \\ and n"),
        ({**CAUSAL, "method": "head"}, "^method must not be 'head' for kind = 'causal_lm', which has no new head$"),
        ({**PROMPTED, "head": "embedding"}, "^head must be left out for kind = 'prompted', got 'embedding'$"),
        ({**PROMPTED, "metric": "loss"}, "^metric must be one of .* for kind = 'prompted', got 'loss'$"),
        ({"update_scale": 0.5, "eval_every": 4}, "^eval_every must be left out for update_scale"),
        ({**CAUSAL, "text": ["a", "b"]}, r"^text must be one column for kind = 'causal_lm', got \['a', 'b'\]$"),
        ({**CAUSAL, "head": "embedding"}, "^head must be left out for kind = 'causal_lm', got 'embedding'$"),
        (
            {"method": "head", "options": {"r": 2}},
            "^options must be left out for method = 'head', which has no adapter$",
        ),
        ({"warmup_steps": 500}, "^warmup_steps must be in 0 .. steps = 200, got 500$"),
        ({"batch_size": 6, "accumulation": 4}, "^accumulation must divide batch_size = 6, got 4$"),
        ({"text": []}, "^text must have at least 1 item"),
        ({"text": "review"}, "^text must be a list, got 'review'$"),
        ({"columns": ["a", "a"]}, r"^columns must be different values, got \['a', 'a'\]$"),
        ({"max_train": 0}, "^max_train must be greater than or equal to 1, got 0$"),
        ({"learning_rate": float("inf")}, "^learning_rate must be a finite number, got inf$"),
        ({"colour": 1}, "^colour must be one of the fields base, .*, got 'colour'"),
    ],
)
def test_errors_name_the_field(changes, message):
    with pytest.raises(SettingsError, match=message):
        build(Settings, {"base": "b", "train": "a.tsv", **changes})


def test_metric_follows_the_kind():
    kinds = ("classification", "regression", "causal_lm")
    found = [Settings(base="b", train="a", kind=kind).scored_by for kind in kinds]
    assert found == ["accuracy", "correlation", "loss"]
    assert build(Settings, {"base": "b", "train": "a", **PROMPTED}).scored_by == "accuracy"


def test_old_texts():
    def old(retain):
        return Settings(base="b", train="a", kind="causal_lm", retain=retain).old_texts

    assert (old(None), old("b.txt"), old(["b.txt", "c.txt"])) == ([], ["b.txt"], ["b.txt", "c.txt"])


def test_base_in_a_package():
    assert resolve_base("package:torchdsc/configs").endswith("torchdsc/configs")
    assert resolve_base("some/id") == "some/id"
    with pytest.raises(ValueError, match="base must name an installed package, got 'package:no_such/x'"):
        resolve_base("package:no_such/x")
    with pytest.raises(ValueError, match=r"base must be llama2c:MODEL.bin:TOKENIZER.bin, got 'llama2c:a.bin'"):
        resolve_base("llama2c:a.bin")
    with pytest.raises(ValueError, match=r"base must be gguf:FILE.gguf, a file that is there, got 'nowhere.gguf'"):
        resolve_base("gguf:nowhere.gguf")

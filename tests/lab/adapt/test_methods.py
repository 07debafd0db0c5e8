import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchdsc.lab.adapt.config import AdaptConfig, Method, Task
from torchdsc.lab.adapt.data import TaskData
from torchdsc.lab.adapt.methods import adapter_parameters, build_model, head_parameters, solve_size
from torchdsc.lab.schema import SettingsError

TARGETS = {"target_modules": ["query", "value"]}


def study(encoder, **changes):
    methods = [Method("m", "full")]
    return AdaptConfig(**{"base": encoder, "tasks": [Task("t", "a")], "methods": methods, **changes})


def data_of(labels=("0", "1")):
    return TaskData(Task("t", "a"), None, None, None, None, list(labels), (0.0, 1.0), [], None)


DATA = data_of()


@pytest.mark.parametrize(
    ("kind", "options", "size"),
    [
        ("lora", {}, "r"),
        ("mixture_of_loras", {}, "num_experts"),
        ("dsc", {}, "num_atoms"),
        ("dsc", {"share_bank": True, "share_router": True}, "num_atoms"),
        ("dsc", {"router": "product_key", "router_rank": 4}, "num_atoms"),
        ("vblora", {"vector_length": 16, "r": 2}, "num_vectors"),
    ],
)
def test_size_is_the_largest_within_the_budget(encoder, kind, options, size):
    method = Method("m", kind, budget=2000, options={**TARGETS, **options})
    solved = solve_size(method, study(encoder))

    def count(value):
        sized = Method("m", kind, options={**solved.options, size: value})
        return adapter_parameters(build_model(sized, study(encoder), DATA))

    best = solved.options[size]
    following = (round(best**0.5) + 1) ** 2 if options.get("router") == "product_key" else best + 1
    assert count(best) <= 2000 < count(following)


def test_head_is_not_of_the_adapter(encoder):
    model = build_model(Method("m", "lora", options={"r": 2, **TARGETS}), study(encoder), DATA)
    assert adapter_parameters(model) == 2 * 2 * 2 * (32 + 32)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapter_parameters(model) + 2 * 32 + 2


def test_same_seed_gives_methods_the_same_head(encoder):
    heads = []
    for kind, options in (("lora", {"r": 2}), ("dsc", {"num_atoms": 8})):
        torch.manual_seed(3)
        state = build_model(Method("m", kind, options={**options, **TARGETS}), study(encoder), DATA).state_dict()
        heads.append(next(value for key, value in state.items() if "classifier.modules_to_save" in key))
    assert torch.equal(*heads)


def test_labels_are_saved_with_the_model(encoder):
    data = data_of(labels=("no", "yes"))
    assert build_model(Method("m", "full"), study(encoder), data).config.id2label == {0: "no", 1: "yes"}


@pytest.mark.parametrize("options", [{}, {"head": "embedding"}])
def test_base_that_lacks_weights(encoder, tmp_path, options):
    folder = shutil.copytree(encoder, tmp_path / "encoder")
    file = folder / "model.safetensors"
    weights = {name: weight for name, weight in load_file(file).items() if "layer.1" not in name}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"the weights in .*/encoder must be those .*: they lack (bert\.)?encoder.layer.1"
    ):
        build_model(Method("m", "full"), study(str(folder), **options), DATA)


def test_head_alone(encoder):
    model = build_model(Method("m", "head"), study(encoder), DATA)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}
    assert adapter_parameters(model) == 0


@pytest.mark.parametrize("kind", ["full", "lora", "dsc"])
def test_head_parameters(encoder, kind):
    options = {"dsc": {"num_atoms": 8}, "lora": {"r": 2}}
    method = Method("m", kind, options={**options[kind], **TARGETS} if kind != "full" else {})
    model = build_model(method, study(encoder), DATA)
    trained = [p for p in head_parameters(model) if p.requires_grad]
    assert sorted(p.numel() for p in trained) == [2, 2 * 32]


class TestErrors:
    def test_budget_too_small(self, encoder):
        with pytest.raises(ValueError, match=r"budget of method 'm' must be at least \d+ \(size 1\), got 10"):
            solve_size(Method("m", "dsc", budget=10, options=TARGETS), study(encoder))

    def test_size_and_budget(self, encoder):
        method = Method("m", "lora", budget=1000, options={"r": 2, **TARGETS})
        with pytest.raises(ValueError, match="options of method 'm' must leave r to its budget, got 2"):
            solve_size(method, study(encoder))

    def test_unknown_option(self, encoder):
        with pytest.raises(ValueError, match=r"options of method .m.: atoms must be one of the fields"):
            solve_size(Method("m", "dsc", budget=1000, options={"atoms": 2}), study(encoder))

    @pytest.mark.parametrize(
        ("kind", "options", "message"),
        [
            ("dsc", {"share_bank": "no"}, "share_bank must be true or false, got 'no'"),
            ("dsc", {"num_atoms": 2.5}, "num_atoms must be an integer, got 2.5"),
            ("dsc", {"num_atoms": 3, "top_k": 9}, "top_k must be at most num_atoms = 3, got 9"),
            ("dsc", {"num_atoms": 10**30}, ".*Overflow"),
            ("dsc", {"target_modules": "(["}, r"target_modules must be a regular expression, got '\(\[': unterminated"),
            ("lora", {"target_modules": "*x"}, r"target_modules must be a regular expression, got '\*x': nothing to"),
            ("lora", {"target_modules": 5}, "target_modules must be a list or be text, got 5"),
            ("lora", {"target_modules": ["nowhere"]}, "No modules were targeted for adaptation"),
            ("lora", {"r": "x"}, "r must be an integer, got 'x'"),
            ("lora", {"r": 0}, r".*value passed is 0, got {.*'r': 0"),
            ("lora", {"lora_dropout": 5.0}, "dropout probability has to be between 0 and 1, but got 5.0"),
            ("vblora", {"vector_length": 7}, ".*must be divisible by `vector_length` 7"),
        ],
    )
    def test_options_are_refused_before_anything_is_trained(self, encoder, kind, options, message):
        method = Method("m", kind, options={**TARGETS, **options})
        with pytest.raises(SettingsError, match=f"^options of method 'm': {message}"):
            solve_size(method, study(encoder))

    @pytest.mark.parametrize(
        ("kind", "options"), [("dsc", {"num_atoms": 10**12}), ("lora", {"r": 10**12}), ("vera", {"r": 10**12})]
    )
    def test_adapters_beyond_memory(self, encoder, kind, options):
        with pytest.raises(SettingsError, match=r"^method 'm' must fit in memory, [\d,]+ bytes, got [\d,]+ parameters"):
            solve_size(Method("m", kind, options={**TARGETS, **options}), study(encoder))
        if kind != "vera":
            with pytest.raises(SettingsError, match=r"^method 'm' must fit in memory"):
                solve_size(Method("m", kind, budget=10**13, options=TARGETS), study(encoder))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"hidden_dropout_prob": "x"}, "hidden_dropout_prob"),
            ({"nowhere": 1}, r"base_options must be fields of BertConfig, got \['nowhere'\]"),
            ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
            ({"hidden_size": 7}, "not a multiple of the number of attention heads"),
            ({"attn_implementation": "x"}, '"x"'),
        ],
    )
    def test_options_of_the_base(self, encoder, options, message):
        method = Method("m", "lora", options=TARGETS)
        with pytest.raises(SettingsError, match=rf"(?s)^base '.*' with base_options {{.*}}: .*{message}"):
            solve_size(method, study(encoder, base_options=options))

    def test_base_of_another_size_is_not_initialised_at_random(self, encoder):
        changed = study(encoder, base_options={"intermediate_size": 64})
        with pytest.raises(SettingsError, match=r"with base_options .*: they have sizes that differ in bert\."):
            build_model(Method("m", "full"), changed, DATA)

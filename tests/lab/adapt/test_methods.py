import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchdsc.lab.adapt.config import AdaptConfig, Method, Task
from torchdsc.lab.adapt.data import TaskData
from torchdsc.lab.adapt.methods import adapter_parameters, build_model, head_parameters, solve_size

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
        with pytest.raises(ValueError, match=r"options of method 'm': .*'atoms'"):
            solve_size(Method("m", "dsc", budget=1000, options={"atoms": 2}), study(encoder))

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchdsc.lab.schema import SettingsError
from torchdsc.lab.tasks.adaptation.methods import adapter_parameters, build_model, head_parameters, solve_options

TARGETS = {"target_modules": ["query", "value"]}


def build(settings, labels=("0", "1"), **changes):
    chosen = settings(**changes)
    return build_model(chosen, chosen.options, list(labels))


@pytest.mark.parametrize(
    ("method", "options", "size"),
    [
        ("lora", {}, "r"),
        ("lora", {"use_dora": True}, "r"),
        ("lora", {"use_rslora": True}, "r"),
        ("lily", {}, "r"),
        ("miss", {}, "r"),
        ("vera", {}, "r"),
        ("mixture_of_loras", {}, "num_experts"),
        ("dsc", {}, "num_atoms"),
        ("dsc", {"share_bank": True, "share_router": True}, "num_atoms"),
        ("dsc", {"router": "product_key", "router_rank": 4}, "num_atoms"),
        ("vblora", {"vector_length": 16, "r": 2}, "num_vectors"),
    ],
)
def test_size_is_the_largest_within_the_budget(settings, method, options, size):
    solved = solve_options(settings(method=method, budget=2000, options={**TARGETS, **options}))

    def count(value):
        return adapter_parameters(build(settings, method=method, options={**solved, size: value}))

    best = solved[size]
    following = (round(best**0.5) + 1) ** 2 if options.get("router") == "product_key" else best + 1
    assert count(best) <= 2000 < count(following)


def test_few_atoms_are_all_selected(settings):
    solved = solve_options(settings(method="dsc", budget=2600, options={**TARGETS, "top_k": 16}))
    assert solved["top_k"] == solved["num_atoms"] == 6


def test_head_is_not_of_the_adapter(settings):
    model = build(settings)
    assert adapter_parameters(model) == 2 * 2 * 2 * (32 + 32)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapter_parameters(model) + 2 * 32 + 2


def test_same_seed_gives_methods_the_same_head(settings):
    heads = []
    for method, options in (("lora", {"r": 2}), ("dsc", {"num_atoms": 8})):
        torch.manual_seed(3)
        state = build(settings, method=method, options={**options, **TARGETS}).state_dict()
        heads.append(next(value for key, value in state.items() if "classifier.modules_to_save" in key))
    assert torch.equal(*heads)


def test_labels_are_saved_with_the_model(settings):
    model = build(settings, labels=("no", "yes"), method="full", options={})
    assert model.config.id2label == {0: "no", 1: "yes"}


@pytest.mark.parametrize("head", [None, "embedding"])
def test_base_that_lacks_weights(settings, encoder, tmp_path, head):
    folder = shutil.copytree(encoder, tmp_path / "encoder")
    file = folder / "model.safetensors"
    weights = {name: weight for name, weight in load_file(file).items() if "layer.1" not in name}
    save_file(weights, file, metadata={"format": "pt"})
    message = r"^base '.*': the weights in .*/encoder must be those .*: they lack (bert\.)?encoder.layer.1"
    with pytest.raises(SettingsError, match=message):
        build(settings, base=str(folder), head=head)


def test_size_of_atoms_by_ngrams(settings, prose):
    options = {"target_modules": ["mlp"], "router": "ngram", "ngram_orders": [1, 2, 3], "top_k": 12}
    changes = {**prose, "method": "dsc"}
    # Two layers of M (32 + 32) + 32.
    assert solve_options(settings(**{**changes, "budget": 2000, "options": options}))["num_atoms"] == 15
    few = solve_options(settings(**{**changes, "budget": 700, "options": options}))
    assert (few["num_atoms"], few["top_k"]) == (4, 3)
    for orders, message in ((3, "Sequence"), ([], "")):
        wrong = settings(**{**changes, "budget": 700, "options": {**options, "ngram_orders": orders}})
        with pytest.raises(SettingsError, match=f"ngram_orders must .*{message}"):
            solve_options(wrong)
    with pytest.raises(SettingsError, match=r"^budget of dsc must be at least 448 \(size 3\), got 400"):
        solve_options(settings(**{**changes, "budget": 400, "options": options}))


@pytest.mark.parametrize(("method", "options"), [("head", {}), ("full", {}), ("lora", {"r": 2}), ("dsc", {})])
def test_head_parameters(settings, method, options):
    model = build(settings, method=method, options={**options, **TARGETS} if method not in ("head", "full") else {})
    trained = [p for p in head_parameters(model) if p.requires_grad]
    assert sorted(p.numel() for p in trained) == [2, 2 * 32]
    if method == "head":
        assert adapter_parameters(model) == 0
        assert sum(p.requires_grad for p in model.parameters()) == 2


class TestErrors:
    @pytest.mark.parametrize(
        ("method", "budget", "options", "message"),
        [
            ("dsc", 10, {}, r"^budget of dsc must be at least \d+ \(size 1\), got 10"),
            ("lora", 1000, {"r": 2}, "^options of lora must leave r to the budget, got 2"),
            ("dsc", 1000, {"atoms": 2}, "^options of dsc: atoms must be one of the fields"),
            ("dsc", None, {"share_bank": "no"}, "^options of dsc: share_bank must be true or false, got 'no'"),
            ("dsc", None, {"num_atoms": 3, "top_k": 9}, "^options of dsc: top_k must be at most num_atoms = 3, got 9"),
            ("dsc", None, {"num_atoms": 10**30}, "^options of dsc: .*Overflow"),
            ("lora", None, {"target_modules": "*x"}, r"target_modules must be a regular expression, got '\*x': noth"),
            ("lora", None, {"target_modules": ["nowhere"]}, "^options of lora: No modules were targeted"),
            ("lora", None, {"r": 0}, "^options of lora: .*value passed is 0, got {.*'r': 0"),
            ("lora", None, {"lora_dropout": 5.0}, "dropout probability has to be between 0 and 1, but got 5.0"),
            ("vblora", None, {"vector_length": 7}, ".*must be divisible by `vector_length` 7"),
            ("dsc", None, {"num_atoms": 10**12}, r"^the adapter of dsc must fit in memory, [\d,]+ bytes, got [\d,]+"),
            ("vera", None, {"r": 10**12}, "^the adapter of vera must fit in memory"),
            ("lora", 10**13, {}, "^the adapter of lora must fit in memory"),
            ("dsc", 10**13, {}, "^the adapter of dsc must fit in memory"),
        ],
    )
    def test_options_are_refused_before_anything_is_trained(self, settings, method, budget, options, message):
        with pytest.raises(SettingsError, match=message):
            solve_options(settings(method=method, budget=budget, options={**TARGETS, **options}))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"hidden_dropout_prob": "x"}, "hidden_dropout_prob"),
            ({"nowhere": 1}, r"base_options must be fields of BertConfig, got \['nowhere'\]"),
            ({"hidden_size": 7}, "not a multiple of the number of attention heads"),
            ({"attn_implementation": "x"}, '"x"'),
        ],
    )
    def test_options_of_the_base(self, settings, options, message):
        with pytest.raises(SettingsError, match=rf"(?s)^base '.*' with base_options {{.*}}: .*{message}"):
            solve_options(settings(base_options=options))

    def test_base_of_another_size_is_not_initialised_at_random(self, settings):
        with pytest.raises(SettingsError, match=r"with base_options .*: they have sizes that differ in bert\."):
            build(settings, base_options={"intermediate_size": 64})

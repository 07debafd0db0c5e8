"""Every kind of model with every way to target it: identity, what trains, what is saved, and loading."""

import pytest
import torch
from peft import PeftModel

from torchdsc import regularization

GLU = {"target_modules": ["q_proj", "v_proj"]}
TARGETS = {
    "mlp": {
        "names": {"target_modules": ["first", "block.2"]},
        "regex": {"target_modules": r"block\.[02]"},
        "all linear": {"target_modules": "all-linear"},
        "whole": {"target_modules": ["block"]},
        "all but": {"target_modules": "all-linear", "exclude_modules": ["last"]},
        "with a new head": {"target_modules": ["block"], "modules_to_save": ["last"]},
    },
    "gpt2": {
        "names": {"target_modules": ["c_attn", "c_fc"]},
        "regex": {"target_modules": r".*\.mlp\.c_(fc|proj)"},
        "all linear": {"target_modules": "all-linear"},
        "whole": {"target_modules": ["mlp"]},
        "default": {},
        "layers": {"target_modules": ["c_attn"], "layers_to_transform": [1]},
    },
    "llama": {
        "names": GLU,
        "regex": {"target_modules": r".*\.(up|down)_proj"},
        "all linear": {"target_modules": "all-linear"},
        "whole": {"target_modules": ["mlp"]},
        "whole attention": {"target_modules": ["self_attn"]},
        "default": {},
        "layers": {**GLU, "layers_to_transform": 1, "layers_pattern": "layers"},
    },
    "bert": {
        "names": {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]},
        "regex": {"target_modules": r".*\.output\.dense"},
        "all linear": {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
        "whole": {"target_modules": ["intermediate"]},
        "default": {"task_type": "SEQ_CLS"},
        "layers": {"target_modules": ["query"], "layers_to_transform": [0]},
    },
    "t5": {
        "names": {"target_modules": ["q", "v"]},
        "regex": {"target_modules": r".*decoder.*\.wo"},
        "all linear": {"target_modules": "all-linear"},
        "whole": {"target_modules": ["DenseReluDense"]},
        "default": {},
    },
    "mixtral": {"names": GLU, "all linear": {"target_modules": "all-linear"}, "default": {}},
    "qwen_moe": {"names": GLU, "whole": {"target_modules": ["shared_expert"]}},
    "dscgpt": {
        "names": {"target_modules": ["qkv_proj", "down"]},
        "all linear": {"target_modules": "all-linear"},
        "whole": {"target_modules": ["feed_forward.base"]},
    },
}
OPTIONS = {
    "shared bank": {"share_bank": True},
    "shared router": {"share_router": True},
    "shared both": {"share_bank": True, "share_router": True},
    "low rank": {"router": "low_rank", "router_rank": 4},
    "product keys": {"router": "product_key", "router_heads": 2},
    "router norm with parameters": {"router_norm": "layer_affine", "router_bias": True},
    "scalar gamma": {"channelwise_gamma": False, "router_norm": "none"},
    "mixture of LoRAs": {"method": "molora"},
    "mixture of LoRAs of rank 1": {"method": "molora", "rank": 1, "normalize_weights": False},
}
CASES = [
    *((kind, target, fields, {}) for kind, targets in TARGETS.items() for target, fields in targets.items()),
    *(
        (kind, name, TARGETS[kind]["names"], fields)
        for kind in ("mlp", "gpt2", "llama")
        for name, fields in OPTIONS.items()
    ),
]


@pytest.fixture(params=CASES, ids=[f"{case[0]}, {case[1]}" for case in CASES])
def case(request):
    kind, _, fields, options = request.param
    return kind, {**fields, **options}


@pytest.fixture
def fresh(case, adapt):
    kind, fields = case
    return adapt(kind, **fields)


def loss_of(model, batch):
    output = model(**batch)
    return output.loss if hasattr(output, "loss") else output.square().mean() + regularization(model).total


def is_adapter(name):
    return ".dsc_layers." in name or ".molora_layers." in name or ".modules_to_save." in name


def test_a_fresh_adapter_is_the_identity(case, fresh, make_base, make_batch, output, adapter_layers):
    batch = make_batch(case[0])
    assert adapter_layers(fresh)
    expected = output(make_base(case[0]), batch)
    assert torch.equal(output(fresh, batch), expected)
    assert torch.equal(output(fresh.train(), batch), expected)


def test_only_adapters_train_and_the_base_stays(case, fresh, make_base, make_batch):
    batch, model = make_batch(case[0]), fresh.train()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if is_adapter(name)}
    start = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    still = {name for name, value in model.state_dict().items() if torch.equal(value, start[name])}
    assert still == {name for name in start if not is_adapter(name)}


@pytest.mark.parametrize("weights", [{}, {"aux_weight": 10.0, "z_weight": 10.0}], ids=["weights", "large weights"])
def test_only_gamma_gets_a_gradient_at_first(weights, case, adapt, make_batch):
    kind, fields = case
    if fields.get("method") == "molora":
        pytest.skip("has no gamma")
    more = {"budget_weight": 10.0, "frame_weight": 10.0, "budget": 50.0} if weights else {}
    model = adapt(kind, **fields, **weights, **more).train()
    loss_of(model, make_batch(kind)).backward()
    for name, parameter in model.named_parameters():
        if ".dsc_layers." in name:
            assert name.endswith("gamma") == bool(parameter.grad.any()), name


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saves_the_adapter_alone_and_loads_it(
    low_cpu_mem_usage, case, fresh, make_base, make_batch, moved, output, tmp_path
):
    from safetensors.torch import load_file

    kind, batch = case[0], make_batch(case[0])
    moved(fresh).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    trained = {name for name, parameter in fresh.named_parameters() if parameter.requires_grad}
    assert set(saved) == {name.replace(".modules_to_save.", ".").replace(".default", "") for name in trained}
    loaded = PeftModel.from_pretrained(make_base(kind), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    expected = output(fresh, batch)
    assert not torch.equal(expected, output(make_base(kind), batch))
    assert torch.equal(output(loaded, batch), expected)

"""Parameters that are elsewhere outside their own module's call: offloaded by accelerate, or wrapped by PEFT."""

import pytest
import torch

from torchdsc import DSC, regularization
from torchdsc.baselines import PEER, DenseFFN, MixtureOfLoRAs, StandardMoE
from torchdsc.diagnostics import RoutingMonitor
from torchdsc.losses import frame_loss
from torchdsc.models import DSCGPTConfig, DSCGPTForCausalLM

accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

DSC_OPTIONS = {"num_atoms": 25, "top_k": 4}
MODELS = {
    "dsc": ("dsc", DSC_OPTIONS | {"attention_rank": 2}),
    "affine": ("dsc", DSC_OPTIONS | {"router": "low_rank", "router_norm": "layer_affine", "router_bias": True}),
    "relu": ("dsc", DSC_OPTIONS | {"router": "product_key", "activation": "relu", "share_bank": True}),
    "basic": ("dsc", DSC_OPTIONS | {"channelwise_gamma": False, "router_norm": "none", "router_context": 3}),
    "moe": ("moe", {"num_experts": 4, "shared_experts": 1}),
    "mixture": ("mixture_of_loras", {"num_experts": 4, "rank": 2}),
    "peer": ("peer", {"num_experts": 25, "top_k": 4}),
    "dense": ("dense", {}),
    "gated": ("gated", {"gate_norm": "layer", "router_input": "embeddings", "router_context": 2}),
}
LAYERS = {
    "dsc": lambda: DSC(8, 6, **DSC_OPTIONS, router_norm="layer_affine"),
    "moe": lambda: StandardMoE(8, 6, 4, shared_experts=1),
    "mixture": lambda: MixtureOfLoRAs(8, 6, num_experts=4, rank=2),
    "peer": lambda: PEER(8, 6, num_experts=25, top_k=4),
    "dense": lambda: DenseFFN(8, 6),
}


def make_model(name):
    kind, options = MODELS[name]
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = DSCGPTConfig(**sizes, intermediate_size=8, dropout=0.0, feed_forward=kind, feed_forward_options=options)
    return spread(DSCGPTForCausalLM(config))


def spread(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module


def offload(module, where, folder):
    if where == "cpu":
        accelerate.cpu_offload(module)
        return
    places = {name: "disk" for name, _ in module.named_children()}
    if isinstance(module, DSCGPTForCausalLM):
        # The tied weights of embedding and head stay together.
        inner = {f"model.{name}": "disk" for name, _ in module.model.named_children()}
        places = inner | {"model.embed_tokens": "cpu", "lm_head": "cpu"}
    accelerate.dispatch_model(module, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("name", MODELS)
def test_offloaded_models_give_the_same(name, where, tmp_path):
    model, input_ids = make_model(name), torch.randint(0, 32, (2, 9))
    expected = {}
    for training in (False, True):
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                expected[training, gradients] = model.train(training)(input_ids, labels=input_ids)
    offload(model, where, tmp_path)
    assert all(p.is_meta for p in model.model.blocks.parameters())
    for (training, gradients), before in expected.items():
        with torch.set_grad_enabled(gradients):
            after = model.train(training)(input_ids, labels=input_ids)
        assert torch.equal(after.logits, before.logits)
        assert torch.equal(after.loss, before.loss)


@pytest.mark.parametrize("name", LAYERS)
def test_offloaded_layers_give_the_same(name, tmp_path):
    layer, x = spread(LAYERS[name]()), torch.randn(3, 5, 8)
    with torch.no_grad():
        untraced = layer(x)
    traced = layer(x)
    offload(layer, "cpu", tmp_path)
    assert torch.equal(layer(x), traced)
    with torch.no_grad():
        assert torch.equal(layer(x), untraced)


def adapted(name, *parameters):
    model, config = make_model(name), {"task_type": "CAUSAL_LM", "r": 2, "target_modules": []}
    return peft.get_peft_model(model, peft.LoraConfig(target_parameters=list(parameters), **config))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("moe", ["experts.up_proj", "experts.down_proj"]),
        ("moe", ["router.linear.weight"]),
        ("basic", ["bank.u", "bank.v"]),
        ("basic", ["router.weight"]),
        ("affine", ["router.down", "router.weight"]),
        ("mixture", ["router.linear.weight"]),
        ("peer", ["router.query"]),
    ],
    ids=str,
)
def test_lora_on_parameters_works_and_trains(name, parameters):
    model, input_ids = adapted(name, *parameters), torch.randint(0, 32, (2, 9))
    with model.disable_adapter(), torch.no_grad():
        base = model(input_ids).logits
    with torch.no_grad():
        assert torch.equal(model(input_ids).logits, base)
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    assert len(trained) == 2 * 2 * len(parameters)
    for key, value in trained.items():
        if "lora_B" in key:
            torch.nn.init.normal_(value, std=0.4)
    output = model.train()(input_ids, labels=input_ids)
    assert not torch.allclose(output.logits, base, atol=1e-3)
    output.loss.backward()
    assert all(value.grad.any() for value in trained.values())
    merged = model.eval().merge_and_unload()
    torch.testing.assert_close(merged(input_ids).logits, output.logits)


def test_frame_term_is_of_the_adapted_rows():
    model, input_ids = adapted("basic", "bank.u"), torch.randint(0, 32, (2, 9))
    for key, value in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(value, std=0.4)
    terms = model.train()(input_ids, labels=input_ids).regularization
    merged = model.merge_and_unload()
    banks = [block.routed_layer.bank for block in merged.model.blocks]
    torch.testing.assert_close(terms["frame"], sum(frame_loss(bank).detach() for bank in banks))


def test_a_monitor_counts_what_an_adapted_router_selects():
    layer = spread(DSC(8, **DSC_OPTIONS))
    config = peft.LoraConfig(target_parameters=["router.weight"], target_modules=[], r=2, init_lora_weights=False)
    model, x = peft.get_peft_model(torch.nn.Sequential(layer), config), torch.randn(40, 8)
    layer = model.base_model.model[0]
    with RoutingMonitor(model) as monitor, torch.no_grad():
        model(x)
    with torch.no_grad():
        expected = layer.route(x)
    (counted,) = monitor.layers()
    assert counted.utilization == len(expected.indices.unique()) / 25
    assert counted.strength == pytest.approx(float(expected.strength.mean()), rel=1e-5)


def test_regularisers_of_an_offloaded_layer_alone(tmp_path):
    layer, x = spread(LAYERS["dsc"]()), torch.randn(3, 5, 8)
    _y = layer(x)
    expected = regularization(layer).as_dict()
    offload(layer, "cpu", tmp_path)
    y = layer(x)
    assert regularization(layer).as_dict() == expected
    assert y.requires_grad

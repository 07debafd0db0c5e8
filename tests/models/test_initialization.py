import math

import pytest
import torch

from torchdsc.models import DSCGPTForCausalLM

STD = 0.05
# Two layers: the residual stream is written by 4 branches.
SMALL = STD / 2


@pytest.fixture
def make(make_config):
    """Wide enough that a standard deviation is measured to a few percent."""

    def build(kind, **changes):
        options = changes.pop("feed_forward_options", {})
        if kind.startswith("dsc"):
            options = {"num_atoms": 100, **options}
        settings = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 200, "initializer_range": STD}
        config = make_config(kind, feed_forward_options=options, **{**settings, **changes})
        return DSCGPTForCausalLM(config)

    return build


def deviation(model, name):
    return model.get_parameter(f"model.blocks.1.{name}").std().item()


@pytest.mark.parametrize(
    ("residual_init", "attention", "feed_forward", "experts"),
    [("gpt2", SMALL, SMALL, SMALL), ("published", SMALL, STD, SMALL), ("none", STD, STD, STD)],
)
class TestResidualInit:
    def test_of_attention(self, residual_init, attention, feed_forward, experts, kind, make):
        model = make(kind, residual_init=residual_init)
        assert deviation(model, "attention.out_proj.weight") == pytest.approx(attention, rel=0.05)
        assert deviation(model, "attention.qkv_proj.weight") == pytest.approx(STD, rel=0.05)

    @pytest.mark.parametrize("static", ["dense", "gated", "dsc", "mixture_of_loras"])
    def test_of_the_feed_forward_layer(self, residual_init, attention, feed_forward, experts, static, make):
        model, prefix = (
            make(static, residual_init=residual_init),
            "feed_forward." + "base." * (static not in ("dense", "gated")),
        )
        assert deviation(model, f"{prefix}down.weight") == pytest.approx(feed_forward, rel=0.05)
        for name in ("up", "gate") if static == "gated" else ("up",):
            assert deviation(model, f"{prefix}{name}.weight") == pytest.approx(STD, rel=0.05)

    def test_of_shared_experts(self, residual_init, attention, feed_forward, experts, make):
        model = make("moe", residual_init=residual_init, feed_forward_options={"shared_experts": 2})
        assert deviation(model, "feed_forward.shared.down.weight") == pytest.approx(feed_forward, rel=0.05)

    def test_of_experts(self, residual_init, attention, feed_forward, experts, make):
        model = make("moe", residual_init=residual_init)
        assert deviation(model, "feed_forward.experts.down_proj") == pytest.approx(experts, rel=0.05)
        assert deviation(model, "feed_forward.experts.up_proj") == pytest.approx(STD, rel=0.05)


def test_of_gated_experts(make):
    model = make("moe", feed_forward_options={"gated": True})
    assert deviation(model, "feed_forward.experts.gate_up_proj") == pytest.approx(STD, rel=0.05)


def test_embeddings_and_norms(kind, make):
    model = make(kind)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(STD, rel=0.05)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, name.endswith("weight")))


def test_dsc_keeps_its_own_way_to_start(make):
    options = {"gamma_init": 0.3, "atom_init_norm": 0.5, "router_bias": True, "router_norm": "layer_affine"}
    dsc = make("dsc", feed_forward_options=options).model.blocks[1].routed_layer
    assert torch.equal(dsc.gamma, torch.full((64,), 0.3))
    for atoms in (dsc.bank.u, dsc.bank.v):
        assert atoms.norm().item() == pytest.approx(0.5 * math.sqrt(100), rel=1e-4)
        gram = atoms.T @ atoms
        torch.testing.assert_close(gram, gram[0, 0] * torch.eye(64), atol=1e-5, rtol=0)
    assert dsc.router.weight.std().item() == pytest.approx(STD, rel=0.05)
    assert not dsc.router.bias.any()
    assert torch.equal(dsc.router.norm.weight, torch.ones(64))


def test_a_router_with_a_deviation_of_its_own(make):
    dsc = make("dsc", feed_forward_options={"router_init_std": 0.3}).model.blocks[1].routed_layer
    assert dsc.router.weight.std().item() == pytest.approx(0.3, rel=0.05)
    dsc.reset_parameters()
    assert dsc.router.weight.std().item() == pytest.approx(0.3, rel=0.05)


def test_contexts_start_from_the_token_and_an_input_without_embeddings_of_its_own(make):
    block = make("moe, embeddings").model.blocks[1]
    assert block.router_context.weight[:, 0].tolist() == [1.0, 0.5]
    assert block.input_context.weight[:, 0].tolist() == [0.0, 0.25, 0.25, 0.25]


def test_loras_start_as_the_zero_update(make):
    lora = make("mixture_of_loras").model.blocks[0].routed_layer
    assert not lora.up.any()
    assert lora.down.abs().max() <= 64**-0.5
    assert lora.down.std().item() == pytest.approx((64 * 3) ** -0.5, rel=0.1)


@pytest.mark.parametrize("dropped", ["bank.u", "bank.v", "gamma", "router.weight", "router_context.weight"])
def test_fills_only_what_a_checkpoint_leaves_out(dropped, make, tmp_path):
    model = make("dsc, embeddings", feed_forward_options={"gamma_init": 0.3})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    state = {name: value for name, value in model.state_dict().items() if not name.endswith(dropped)}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = DSCGPTForCausalLM.from_pretrained(tmp_path)
    for name, value in loaded.state_dict().items():
        if name.endswith(dropped):
            assert value.isfinite().all()
            assert value.abs().max() < (1.1 if dropped == "router_context.weight" else 0.5)
        else:
            assert torch.equal(value, model.state_dict()[name])


def test_the_bias_for_selection_is_saved_and_starts_at_zero(make, tmp_path):
    model = make("moe, gated")
    for block in model.model.blocks:
        block.routed_layer.router.moves.copy_(torch.arange(4))
        block.routed_layer.router.load.fill_(7)
    model.save_pretrained(tmp_path / "with")
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("moves")}
    model.save_pretrained(tmp_path / "without", state_dict=state)
    for folder, moves in (("with", [0, 1, 2, 3]), ("without", [0, 0, 0, 0])):
        for block in DSCGPTForCausalLM.from_pretrained(tmp_path / folder).model.blocks:
            assert block.routed_layer.router.moves.tolist() == moves
            assert not block.routed_layer.router.load.any()


def test_the_norm_of_queries_is_saved_and_starts_as_the_identity(make, tmp_path):
    model = make("peer", feed_forward_options={"query_norm": "batch"})
    for block in model.model.blocks:
        torch.nn.init.uniform_(block.routed_layer.router.query_norm.running_mean, 2, 3)
    model.save_pretrained(tmp_path / "with")
    state = {name: value for name, value in model.state_dict().items() if "query_norm" not in name}
    model.save_pretrained(tmp_path / "without", state_dict=state)
    for folder in ("with", "without"):
        loaded = DSCGPTForCausalLM.from_pretrained(tmp_path / folder)
        for block, saved in zip(loaded.model.blocks, model.model.blocks, strict=True):
            norm, expected = block.routed_layer.router.query_norm, saved.routed_layer.router.query_norm
            if folder == "without":
                expected.reset_parameters()
            torch.testing.assert_close(norm.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["mixture_of_loras", "peer"])
def test_fills_factors_that_a_checkpoint_leaves_out_and_keeps_their_others(kind, make, tmp_path):
    model = make(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("dsc.down")}
    model.save_pretrained(tmp_path, state_dict=state)
    for block, saved in zip(DSCGPTForCausalLM.from_pretrained(tmp_path).model.blocks, model.model.blocks, strict=True):
        fresh, kept = block.routed_layer.down, block.routed_layer.up
        assert fresh.mean().abs() < 0.1
        assert fresh.std() > 0.05
        assert torch.equal(kept, saved.routed_layer.up)


def test_the_seed_decides(kind, make):
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(make(kind).state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not torch.equal(states[0]["model.embed_tokens.weight"], states[2]["model.embed_tokens.weight"])

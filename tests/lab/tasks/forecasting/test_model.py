"""The patch transformer: its equations, its loss, its parameters."""

import pytest
import torch

from torchdsc.lab.budget import METHODS
from torchdsc.lab.tasks.forecasting.model import PatchForecaster, PatchForecasterConfig
from torchdsc.lab.tasks.forecasting.run import build_model, make_plan
from torchdsc.nn import Residual

SIZES = {"look_back": 16, "horizon": 4, "patch_length": 8, "stride": 4, "hidden_size": 16, "num_attention_heads": 2}


def make(method="dense", width=24, *, layers=1, std=0.3, **changes):
    options = {"dsc": {"num_atoms": 12, "top_k": 3}}.get(method, {})
    config = PatchForecasterConfig(
        **{**SIZES, "num_hidden_layers": layers, "feed_forward": method, "intermediate_size": width},
        **{"feed_forward_options": options, "initializer_range": std, **changes},
    )
    return PatchForecaster(config).eval()


def test_is_its_equations():
    model, x = make(layers=2), torch.randn(2, 16, 3) * 5 + 7
    forecast = model(x).forecast
    assert forecast.shape == (2, 4, 3)
    for batch in range(2):
        for column in range(3):
            past = x[batch, :, column]
            mean, deviation = past.mean(), (past.var(correction=0) + 1e-5).sqrt()
            patches = torch.stack([(past[start : start + 8] - mean) / deviation for start in (0, 4, 8)])
            states = patches @ model.embed_patches.weight.T + model.embed_positions.weight
            for block in model.blocks:
                attention = block.attention
                query, key, value = attention.qkv_proj(block.attention_norm(states)).chunk(3, dim=-1)
                heads = []
                for head in (slice(0, 8), slice(8, 16)):
                    weights = (query[:, head] @ key[:, head].T / 8**0.5).softmax(dim=-1)
                    heads.append(weights @ value[:, head])
                states = states + attention.out_proj(torch.cat(heads, dim=-1))
                states = states + block.feed_forward(block.feed_forward_norm(states))
            said = model.head(model.final_norm(states).flatten())
            torch.testing.assert_close(forecast[batch, :, column], said * deviation + mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["dense", "dsc"])
def test_columns_are_forecast_by_themselves(method):
    model, x = make(method), torch.randn(2, 16, 3)
    forecast = model(x).forecast
    torch.testing.assert_close(model(x[..., [2, 0, 1]]).forecast, forecast[..., [2, 0, 1]])
    changed = x.clone()
    changed[..., 1] = torch.randn(2, 16)
    torch.testing.assert_close(model(changed).forecast[..., [0, 2]], forecast[..., [0, 2]])
    assert not torch.allclose(model(changed).forecast[..., 1], forecast[..., 1])


def test_forecasts_move_with_the_scale_of_the_look_back():
    model, x = make(), torch.randn(2, 16, 3)
    torch.testing.assert_close(model(100 * x - 30).forecast, 100 * model(x).forecast - 30, rtol=1e-3, atol=1e-2)
    assert model(torch.full((1, 16, 1), 5.0)).forecast.isfinite().all()


@pytest.mark.parametrize("attention", ["full", "causal"])
def test_attention(attention):
    block = make(attention=attention).blocks[0]
    x = torch.randn(1, 3, 16)
    later = x.clone()
    later[:, 2] += 1.0
    assert torch.equal(block(x)[:, :2], block(later)[:, :2]) == (attention == "causal")


class TestLoss:
    def test_regularisers_are_added_in_training_alone(self):
        model, x, y = make("dsc"), torch.randn(2, 16, 3), torch.randn(2, 4, 3)
        output = model(x, y)
        torch.testing.assert_close(output.loss, (model(x).forecast - y).square().mean())
        assert output.regularization is None
        output = model.train()(x, y)
        assert output.loss.item() > output.task_loss.item()
        torch.testing.assert_close(output.task_loss, (output.forecast - y).square().mean())
        assert set(output.regularization) == {"aux", "budget", "frame", "z"}
        assert min(output.regularization["aux"], output.regularization["z"]) > 0
        output.loss.backward()
        assert model.blocks[0].feed_forward.dsc.router.weight.grad.abs().sum() > 0

    def test_cannot_be_lost(self):
        model = make("dsc").train()
        output = model(torch.randn(2, 16, 3), torch.randn(2, 4, 3))
        with pytest.raises(RuntimeError, match="regularisers"):
            output.forecast.square().mean().backward()

    def test_needs_labels(self):
        assert make()(torch.randn(2, 16, 3)).loss is None


class TestParameters:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("n_layer", [1, 2])
    def test_are_the_plans(self, tiny, method, n_layer):
        changes = {"method": method, "n_layer": n_layer, "total": 1_000 + 4_000 * n_layer}
        settings = tiny.model_copy(update={**changes, "active": 1_000 + 2_000 * n_layer})
        plan = make_plan(settings)
        model = build_model(settings, plan)
        total = sum(parameter.numel() for parameter in model.parameters())
        layers = [block.feed_forward for block in model.blocks]
        idle = sum(METHODS[method].idle(x.dsc if isinstance(x, Residual) else x) for x in layers)
        assert (plan.params_total, plan.params_active) == (total, total - idle)
        assert abs(plan.miss_total) < 0.1

    @pytest.mark.parametrize(
        ("method", "options"),
        [("moe", {"gated": True}), ("dsc", {"static": "gated"}), ("dsc", {"router": "product_key"})],
    )
    def test_are_the_plans_with_options(self, tiny, method, options):
        settings = tiny.model_copy(update={"method": method, "feed_forward": options, "total": 7_000, "active": 5_000})
        plan = make_plan(settings)
        assert plan.params_total == sum(p.numel() for p in build_model(settings, plan).parameters())


def test_shapes():
    model = make()
    with pytest.raises(ValueError, match=r"past_values must have shape \(B, look_back = 16, C\), got \(2, 15, 3\)"):
        model(torch.randn(2, 15, 3))
    with pytest.raises(ValueError, match=r"labels must have shape \(2, 4, 3\), got \(2, 5, 3\)"):
        model(torch.randn(2, 16, 3), torch.randn(2, 5, 3))


@pytest.mark.parametrize("options", [{"router": "ngram"}, {"router_context": 2}])
def test_options_that_need_tokens(options):
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=f"patches have no token embeddings or ids, got {name} = {value!r}"):
        PatchForecasterConfig(**SIZES, feed_forward="dsc", feed_forward_options={"num_atoms": 8, "top_k": 2, **options})


def test_is_loaded_as_it_was_saved(tmp_path):
    model, x = make("dsc", attention="causal"), torch.randn(2, 16, 3)
    with torch.no_grad():
        model.head.bias.normal_()
    model.save_pretrained(tmp_path)
    loaded = PatchForecaster.from_pretrained(tmp_path).eval()
    assert torch.equal(model(x).forecast, loaded(x).forecast)

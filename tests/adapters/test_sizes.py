"""Sizes of target modules: those of their input and output, whatever the order of their linear layers."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from torchdsc.adapters import AdapterLayer
from torchdsc.nn.host import feature_sizes


class Reversed(nn.Module):
    """Its linear layers are registered in another order than they run."""

    def __init__(self):
        super().__init__()
        self.down = nn.Linear(24, 16)
        self.up = nn.Linear(16, 24)

    def forward(self, x):
        return self.down(self.up(x).relu())


class Scored(Reversed):
    """Its last linear layer is a gate with one output."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 1)

    def forward(self, x):
        return super().forward(x) * self.gate(x).sigmoid()


class Widening(Reversed):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(24, 40)

    def forward(self, x):
        return self.out(self.up(x))


class Block(Reversed):
    """Wants more than tokens; its norm tells its width."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def forward(self, x, positions):
        return x + super().forward(self.norm(x)) * positions[0]


class Bare(Reversed):
    """Wants more than tokens, and could map either size to itself."""

    def forward(self, x, positions):
        return super().forward(x) * positions[0]


class Single(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.dense = nn.LayerNorm(24), nn.Linear(16, 24)

    def forward(self, x, residual):
        return self.norm(self.dense(x) + residual[0])


class Pooled(Reversed):
    def forward(self, x):
        return super().forward(x)[:, 0]


class Stepwise(Reversed):
    """Counts its calls, and looks at its values."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) if self.calls < 0 or x.sum() > -1e9 else x


class Host(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, *args):
        return self.inner(x, *args)


class TestRealSizes:
    @pytest.mark.parametrize(
        ("inner", "sizes"),
        [
            (Reversed, (16, 16)),
            (Scored, (16, 16)),
            (Widening, (16, 40)),
            (Block, (16, 16)),
            (Single, (16, 24)),
            (lambda: nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 1)), (16, 1)),
            (lambda: nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), (16, 16)),
        ],
        ids=["reversed", "gate last", "widening", "block", "one linear layer", "one output", "torch's encoder layer"],
    )
    @pytest.mark.parametrize("method", ["dsc", "molora"])
    def test_are_told_at_injection(self, method, inner, sizes, make_config, moved):
        torch.manual_seed(0)
        model = get_peft_model(Host(inner()), make_config(method, target_modules=["inner"])).eval()
        (layer,) = (module for module in model.modules() if isinstance(module, AdapterLayer))
        assert (layer.in_features, layer.out_features) == sizes
        x, more = torch.randn(2, 5, 16), (torch.ones(1),) if isinstance(layer.base_layer, Block | Single) else ()
        expected = model(x, *more)
        assert expected.shape == (2, 5, sizes[1])
        assert not torch.equal(moved(model)(x, *more), expected)

    def test_leave_no_trace(self):
        torch.manual_seed(0)
        base = Host(nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(24, 16)))
        state, before = torch.get_rng_state(), {key: value.clone() for key, value in base.inner.state_dict().items()}
        assert feature_sizes(base.inner, "inner") == (16, 16)
        assert torch.equal(torch.get_rng_state(), state)
        assert base.inner.training
        assert all(torch.equal(value, before[key]) for key, value in base.inner.state_dict().items())

    @pytest.mark.parametrize("method", ["dsc", "molora"])
    def test_of_a_mixture_of_experts_with_a_gate(self, method, adapt, make_base, make_batch, output, moved):
        model = adapt("qwen_moe", method, target_modules=["mlp"])
        batch = make_batch("qwen_moe")
        expected = output(make_base("qwen_moe"), batch)
        assert torch.equal(output(model, batch), expected)
        assert not torch.equal(output(moved(model), batch), expected)

    def test_with_the_width_of_the_nearest_config(self, make_config):
        from types import SimpleNamespace

        base = Host(nn.Sequential(Host(Bare())))
        base.config = SimpleNamespace(hidden_size=24)
        base.inner[0].config = SimpleNamespace(hidden_size=16)
        model = get_peft_model(base, make_config(target_modules=["inner.0.inner"]))
        assert model.base_model.model.inner[0].inner.in_features == 16


class TestRefusals:
    @pytest.mark.parametrize(
        ("inner", "message"),
        [
            (Bare, r"in_features and out_features must be given for 'inner', a Bare.*from \[24, 16\] to \[16, 24\]"),
            (Pooled, r"must map tokens.*got 'inner', a Pooled, which maps \(2, 3, 16\) to \(2, 16\)"),
            (Stepwise, "in_features and out_features must be given for 'inner', a Stepwise"),
        ],
    )
    def test_at_injection(self, inner, message, make_config):
        base = Host(inner())
        with pytest.raises(ValueError, match=message):
            get_peft_model(base, make_config(target_modules=["inner"]))
        assert type(base.inner) is inner
        assert not getattr(base.inner, "calls", 0), "a copy is run"

    @pytest.mark.parametrize("sizes", [(16, 16), (16, 24)])
    def test_sizes_can_be_given(self, sizes, make_config, tmp_path):
        torch.manual_seed(0)
        fields = {"in_features": sizes[0], "out_features": sizes[1]}
        model = get_peft_model(Host(Bare()), make_config(target_modules=["inner"], **fields))
        x, more = torch.randn(2, 5, 16), torch.ones(1)
        if sizes == (16, 24):
            with pytest.raises(ValueError, match=r"of 'inner', got \(16, 24\) for \(2, 5, 16\) mapped to \(2, 5, 16\)"):
                model(x, more)
            return
        expected = model(x, more)
        model.save_pretrained(tmp_path)
        base = Host(Bare())
        base.load_state_dict({key.replace("base_layer.", ""): value for key, value in base_state(model).items()})
        assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(x, more), expected)

    def test_given_sizes_are_not_those_of_linear_layers(self, adapt):
        model = adapt("llama", target_modules=["q_proj", "mlp"], in_features=32, out_features=32)
        assert model.base_model.model.model.layers[0].self_attn.q_proj.in_features == 32
        model = adapt("llama", target_modules=["down_proj"], in_features=7, out_features=7)
        assert model.base_model.model.model.layers[0].mlp.down_proj.in_features == 48

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"in_features": 16}, "in_features and out_features must be given together"),
            ({"in_features": 0, "out_features": 4}, "in_features must be >= 1, got 0"),
            ({"in_features": 4, "out_features": 1.5}, "out_features must be an int or None, got 1.5"),
        ],
    )
    def test_of_the_config(self, fields, message, make_config):
        with pytest.raises((TypeError, ValueError), match=message):
            make_config(target_modules=["inner"], **fields)


def base_state(model):
    return {key: value for key, value in model.base_model.model.state_dict().items() if "dsc_layers" not in key}

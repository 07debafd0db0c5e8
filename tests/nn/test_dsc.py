"""The layer against a literal loop over its equations, its options, its states and its errors."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchdsc import DSC, BasisBank, Residual, certified_spectral_bound, regularization, spectral_norm

SIZES = {"num_atoms": 11, "top_k": 3}


def make_layer(in_features=6, out_features=5, **options):
    layer = DSC(in_features, out_features, **(SIZES | options)).double()
    torch.nn.init.normal_(layer.router.weight, std=0.5)
    torch.nn.init.normal_(layer.gamma)
    return layer


def literal(layer, x):
    """Equations (3) to (5), one token and one atom at a time."""
    o = layer.options
    rows = []
    for token in x:
        seen = token
        if o.router_norm != "none":
            seen = (token - token.mean()) / (token.var(unbiased=False) + 1e-5).sqrt()
        raw = layer.router.weight @ seen + (layer.router.bias if o.router_bias else 0.0)
        alpha = torch.log1p(torch.exp(raw.clamp(-o.logit_clamp, o.logit_clamp)))
        selected = raw.argsort(descending=True)[: o.top_k]
        strength = alpha[selected].sum()
        factor = {"sum": strength.tanh(), "mean": (strength / o.top_k).tanh(), "none": 1.0}[o.gate]
        row = torch.zeros(layer.out_features, dtype=x.dtype)
        for j in selected:
            z = alpha[j] / (strength + o.eps) * factor
            u = layer.bank.u[j] / layer.bank.u[j].norm().clamp_min(o.eps)
            v = layer.bank.v[j] / layer.bank.v[j].norm().clamp_min(o.eps)
            latent = token @ u
            row = row + z * (latent.relu() if o.activation == "relu" else latent) * v
        rows.append(row * layer.gamma)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"router_norm": "none", "channelwise_gamma": False},
        {"router_norm": "layer_affine", "router_bias": True},
        {"gate": "mean"},
        {"gate": "none"},
        {"top_k": 1},
        {"top_k": 11},
        {"logit_clamp": 0.3},
        {"activation": "relu"},
    ],
    ids=str,
)
@pytest.mark.parametrize("impl", ["reference", "gather", "dense", "auto"])
def test_equals_literal_loop(options, impl):
    layer = make_layer(impl=impl, **options)
    x = torch.randn(30, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), literal(layer, x), rtol=1e-12, atol=1e-12)


def test_basic_is_algorithm_one():
    layer = DSC.basic(6, **SIZES)
    assert layer.gamma.shape == (1,)
    assert isinstance(layer.router.norm, torch.nn.Identity)
    assert DSC(6, **SIZES).gamma.shape == (6,)


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_gradients_equal_the_literal_loop(activation):
    layer = make_layer(activation=activation).eval()
    x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    weight = torch.randn(8, 5, dtype=torch.float64)
    actual = torch.autograd.grad((layer(x) * weight).sum(), leaves)
    expected = torch.autograd.grad((literal(layer, x) * weight).sum(), leaves)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 3, 6), (0, 6), (2, 0, 6)])
def test_leading_dimensions(shape):
    layer = make_layer()
    x = torch.randn(shape, dtype=torch.float64)
    y = layer(x)
    assert y.shape == (*shape[:-1], 5)
    assert y.dtype == x.dtype
    torch.testing.assert_close(y.reshape(-1, 5), layer(x.reshape(-1, 6)))
    routing = layer.route(x)
    assert routing.indices.shape == routing.coefficients.shape == routing.logits.shape == (*shape[:-1], 3)
    assert routing.strength.shape == shape[:-1]


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_delta_weight_and_route_describe_the_forward_pass(activation):
    layer = make_layer(activation=activation)
    x = torch.randn(4, 7, 6, dtype=torch.float64)
    weight = layer.delta_weight(x)
    assert weight.shape == (4, 7, 6, 5)
    torch.testing.assert_close(torch.einsum("...i,...io->...o", x, weight), layer(x), rtol=1e-12, atol=1e-13)
    routing = layer.route(x)
    logits = layer.router(x)
    assert torch.equal(logits.topk(3).indices, routing.indices)


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 30)),
    top_k=st.integers(1, 30),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
    duplicates=st.booleans(),
    gate=st.sampled_from(["sum", "mean", "none"]),
    activation=st.sampled_from(["none", "relu"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_property_bounds(seed, sizes, top_k, scale, duplicates, gate, activation, dtype):
    """Sum of coefficients and |dW|_2 within their bounds, up to rounding, for every input."""
    in_features, out_features, num_atoms = sizes
    torch.manual_seed(seed)
    options = {"num_atoms": num_atoms, "top_k": min(top_k, num_atoms), "gate": gate, "activation": activation}
    layer = DSC(in_features, out_features, **options).to(dtype)
    with torch.no_grad():
        layer.router.weight.mul_(scale * 50)
        layer.gamma.normal_()
        if duplicates:
            layer.bank.u.copy_(layer.bank.u[:1].expand_as(layer.bank.u))
            layer.bank.v.copy_(layer.bank.v[:1].expand_as(layer.bank.v))
    x = torch.randn(20, in_features, dtype=dtype) * scale
    slack = 1 + 100 * torch.finfo(dtype).eps
    routing = layer.route(x)
    ceiling = {"sum": routing.strength.tanh(), "mean": (routing.strength / min(top_k, num_atoms)).tanh()}
    assert (routing.coefficients.sum(-1) <= ceiling.get(gate, torch.ones(())) * slack).all()
    norms = spectral_norm(layer, x)
    assert (norms <= certified_spectral_bound(layer) * slack).all()
    if duplicates and out_features > 0:
        # Parallel atoms reach sum(z) |u| |v gamma|: the bound is not an empty one. Rows under eps are no unit vectors.
        unit_u, unit_v = layer.bank.unit(layer.options.eps)
        latents = (x @ layer.bank.u.t()).gather(-1, routing.indices)
        composed = routing.coefficients * (latents > 0) if activation == "relu" else routing.coefficients
        expected = composed.sum(-1) * unit_u[0].norm() * (unit_v[0] * layer.gamma).norm()
        torch.testing.assert_close(norms, expected, rtol=1e-4, atol=1e-6)


def test_permuting_atoms_changes_nothing():
    layer = make_layer()
    x = torch.randn(40, 6, dtype=torch.float64)
    permuted = copy.deepcopy(layer)
    order = torch.randperm(11)
    with torch.no_grad():
        for parameter in (permuted.bank.u, permuted.bank.v, permuted.router.weight):
            parameter.copy_(parameter[order])
    torch.testing.assert_close(permuted(x), layer(x), rtol=1e-12, atol=1e-13)


def test_scaling_raw_atoms_changes_nothing():
    layer = make_layer()
    x = torch.randn(10, 6, dtype=torch.float64)
    before = layer(x)
    with torch.no_grad():
        layer.bank.u.mul_(torch.rand(11, 1) + 0.1)
        layer.bank.v.mul_(1e3)
    torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_tokens_spoil_only_their_own_row(bad):
    layer = make_layer()
    x = torch.randn(100, 6, dtype=torch.float64)
    x[17, 2] = bad
    y = layer(x)
    assert y[17].isnan().all()
    assert y[torch.arange(100) != 17].isfinite().all()


def test_gamma_zero_changes_nothing_and_gets_the_first_gradient():
    layer = DSC(6, **SIZES, gamma_init=0.0)
    base = torch.nn.Linear(6, 6)
    x = torch.randn(9, 6)
    residual = Residual(base, layer.eval())
    assert torch.equal(residual(x), base(x))
    optimizer = torch.optim.SGD(residual.parameters(), lr=0.1)
    residual(x).square().sum().backward()
    assert layer.gamma.grad.any()
    assert not layer.bank.u.grad.any()
    assert not layer.router.weight.grad.any()
    optimizer.step()
    optimizer.zero_grad()
    residual(x).square().sum().backward()
    assert layer.bank.u.grad.any()
    assert layer.router.weight.grad.any()


def test_shared_bank():
    bank = BasisBank(11, 6)
    first, second = DSC(6, bank=bank, **SIZES), DSC(6, bank=bank, **SIZES)
    model = torch.nn.Sequential(first, second)
    assert sum(p.numel() for p in model.parameters()) == 2 * 11 * 6 + 2 * (11 * 6 + 6)
    model.eval()(torch.randn(20, 6)).sum().backward()
    assert bank.u.grad.any()


def test_state_dict_and_deepcopy():
    layer = make_layer()
    layer.train()
    x = torch.randn(5, 6, dtype=torch.float64)
    y = layer(x)
    twin = copy.deepcopy(layer)
    assert len(layer.statistics_log) == 1
    assert len(twin.statistics_log) == 0
    assert torch.equal(y, layer(x))
    assert torch.equal(twin(x), layer(x))
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    assert set(layer.state_dict()) == {"bank.u", "bank.v", "router.weight", "gamma"}
    fresh = make_layer()
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(x), layer(x))


def test_a_state_with_a_scalar_gamma_loads():
    model = torch.nn.Sequential(make_layer(channelwise_gamma=False))
    state = {name: value.reshape(()) if name.endswith("gamma") else value for name, value in model.state_dict().items()}
    fresh = torch.nn.Sequential(make_layer(channelwise_gamma=False))
    fresh.load_state_dict(state)
    assert state["0.gamma"].shape == ()
    x = torch.randn(5, 6, dtype=torch.float64)
    assert torch.equal(fresh(x), model(x))


def test_meta_device_and_reset():
    layer = DSC(6, **SIZES, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert layer(torch.randn(3, 6)).isfinite().all()
    torch.testing.assert_close(layer.bank.u.square().sum(1).mean().sqrt(), torch.tensor(0.01))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_routes_in_float32(dtype):
    layer = DSC(16, num_atoms=50, top_k=4).to(dtype)
    x = torch.randn(60, 16, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert layer.router(x).dtype == torch.float32
    expected = copy.deepcopy(layer).double()(x.double())
    assert (y.double() - expected).abs().max() < 2e-2 * expected.abs().max()


def test_autocast():
    layer = DSC(16, num_atoms=50, top_k=4)
    x = torch.randn(60, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = layer.router(x)
        y = layer(x.bfloat16())
        regularization(layer).total.backward()
    assert logits.dtype == torch.float32
    assert torch.equal(logits, layer.router(x))
    assert y.dtype == torch.bfloat16
    assert layer.router.weight.grad.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_compile_whole_layer_with_regularisers(activation):
    torch._dynamo.reset()
    layer = DSC(16, num_atoms=40, top_k=3, activation=activation)

    def step(x):
        return layer(x).square().sum() + regularization(layer).total

    compiled = torch.compile(step, fullgraph=True)
    for tokens in (21, 33, 57):
        x = torch.randn(tokens, 16)
        gradients = []
        for function in (step, compiled):
            layer.zero_grad()
            loss = function(x)
            loss.backward()
            gradients.append([loss.detach(), *(p.grad.clone() for p in layer.parameters())])
        for a, e in zip(*gradients, strict=True):
            torch.testing.assert_close(a, e)


def test_export():
    layer = DSC(16, num_atoms=40, top_k=3).eval()
    program = torch.export.export(layer, (torch.randn(9, 16),), dynamic_shapes=({0: torch.export.Dim("t", min=2)},))
    x = torch.randn(30, 16)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_one_atom_without_a_gate_is_not_trained():
    """Its coefficient would always be 1, and the router get no gradient from the task."""
    layer = DSC(8, num_atoms=16, top_k=1, gate="none")
    with pytest.raises(ValueError, match="gate must be 'sum' or 'mean' to train with top_k = 1, got 'none'"):
        layer(torch.randn(3, 8))
    assert layer.eval()(torch.randn(3, 8)).isfinite().all()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"top_k": 12}, ValueError, "top_k must be at most num_atoms = 11, got 12"),
        ({"top_k": 0}, ValueError, "top_k must be >= 1, got 0"),
        ({"top_k": 2.0}, TypeError, "top_k must be an int"),
        ({"num_atoms": 0}, ValueError, "num_atoms must be >= 1, got 0"),
        ({"logit_clamp": -1.0}, ValueError, "logit_clamp must be finite and > 0, got -1.0"),
        ({"eps": 0.0}, ValueError, "eps must be"),
        ({"atom_init_norm": 0.0}, ValueError, "atom_init_norm must be"),
        ({"max_update_norm": -1.0}, ValueError, "max_update_norm must be finite and > 0, got -1.0"),
        ({"router_init_std": 0.0}, ValueError, "router_init_std must be finite and > 0, got 0.0"),
        ({"z_weight": -0.1}, ValueError, "z_weight must be finite and >= 0"),
        ({"frame_weight": float("nan")}, ValueError, "frame_weight must be"),
        ({"router": "hash"}, ValueError, "router must be one of"),
        ({"gate": "max"}, ValueError, "gate must be one of"),
        ({"activation": "gelu"}, ValueError, "activation must be one of"),
        ({"impl": "fast"}, ValueError, "impl must be one of"),
        ({"router_norm": "rms"}, ValueError, "router_norm must be one of"),
        ({"colour": 1}, TypeError, "colour"),
        ({"bank": BasisBank(10, 6)}, ValueError, r"bank must have .* \(11, 6, 6\), got \(10, 6, 6\)"),
    ],
    ids=str,
)
def test_wrong_options(options, error, match):
    with pytest.raises(error, match=match):
        DSC(6, **(SIZES | options))


def test_triton_is_taken_by_name():
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = make_layer(impl="triton").to(device)
    other = make_layer(impl="gather").to(device)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, dtype=torch.float64, device=device)
    torch.testing.assert_close(layer(x), other(x))


def test_wrong_inputs():
    layer = DSC(6, **SIZES)
    with pytest.raises(ValueError, match=r"in_features = 6\), got \(3, 5\)"):
        layer(torch.randn(3, 5))
    with pytest.raises(TypeError, match=r"dtype of the parameters, torch.float32, got torch.float64"):
        layer(torch.randn(3, 6, dtype=torch.float64))
    with pytest.raises(TypeError, match="int64"):
        layer(torch.ones(3, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"token_mask must have shape \(3,\), got \(2,\)"):
        layer(torch.randn(3, 6), torch.ones(2))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((0, 4), "num_atoms must be >= 1, got 0"),
        ((4, 0), "in_features must be >= 1"),
        ((4, 4, 0), "out_features must be >= 1"),
    ],
)
def test_wrong_bank(arguments, match):
    with pytest.raises(ValueError, match=match):
        BasisBank(*arguments)


@pytest.mark.parametrize("num_atoms", [3, 40])
def test_bank_starts_orthogonal(num_atoms):
    bank = BasisBank(num_atoms, 8, 6, init_norm=0.01).double()
    for rows in (bank.u, bank.v):
        torch.testing.assert_close(rows.square().sum(1).mean().sqrt().item(), 0.01, rtol=1e-5, atol=0)
        gram = rows @ rows.t() if num_atoms < rows.shape[1] else rows.t() @ rows
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64) * gram[0, 0], rtol=1e-4, atol=1e-9)
    unit_u, _ = bank.unit()
    torch.testing.assert_close(unit_u.norm(dim=1), torch.ones(num_atoms, dtype=torch.float64))

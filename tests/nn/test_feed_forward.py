"""The recommended layer against its parts wired by hand, against itself token by token, its states and its errors."""

import copy
import io

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from torchdsc import DSC, BasisBank, DSCFeedForward, Residual, ShortConvolution, regularization
from torchdsc.nn import DenseFFN, GatedFFN
from torchdsc.ops import ngram_codes

D = 8
SIZES = {"num_atoms": 11, "top_k": 3}
NGRAMS = {"num_atoms": 11, "top_k": 4, "router": "ngram"}
# What a layer may see of a sequence, besides what is recommended.
CONTEXTS = {
    "recommended": {},
    "embeddings alone": {"router_context": 1, "input_context": 1},
    "mixed for the router": {"router_context": 4, "input_context": 1},
    "mixed for the layer": {"router_input": "hidden", "router_context": 1, "input_context": 2},
    "hidden states mixed": {"router_input": "hidden", "router_context": 3, "input_context": 1},
    "hidden": {"router_input": "hidden", "router_context": 1, "input_context": 1},
    "gated": {"static": "gated"},
    "gated by hidden states": {"static": "gated", "router_input": "hidden", "router_context": 1},
    "n-grams": NGRAMS,
    "n-grams alone": {**NGRAMS, "input_context": 1, "ngram_orders": (1, 4)},
    "n-grams, gated": {**NGRAMS, "static": "gated"},
    "n-grams, gated by hidden states": {
        **NGRAMS,
        "static": "gated",
        "router_input": "hidden",
        "router_context": 1,
    },
}


def make_layer(hidden_features=6, *, dtype=torch.float64, **options):
    layer = DSCFeedForward(D, hidden_features, dtype=dtype, **(SIZES | options))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def tokens(*shape, dtype=torch.float64):
    """Hidden states and embeddings, which are not normalised."""
    return torch.randn(*shape, D, dtype=dtype), 3 * torch.randn(*shape, D, dtype=dtype) + 1


def ids(*shape):
    """Token ids that need all of their bytes."""
    return torch.randint(2**32 - 3, 2**32 - 1, shape)


def left_padded(*lengths):
    return torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths).unsqueeze(1)


class ByHand(torch.nn.Module):
    """What docs once asked a user to wire."""

    def __init__(self):
        super().__init__()
        dsc = DSC(D, num_atoms=11, top_k=3, gamma_init=1.0, frame_weight=0.0, budget=40.0)
        self.layer = Residual(DenseFFN(D, 6), dsc)
        self.router_context = ShortConvolution(D, 3)
        self.input_context = ShortConvolution(D, 4, own=0.0, earlier=0.25)

    def forward(self, x, embeddings, token_mask=None):
        seen = functional.layer_norm(embeddings, (D,))
        if token_mask is not None:
            seen = seen.masked_fill(~token_mask.unsqueeze(-1), 0.0)
        routed = self.router_context(seen)
        return self.layer(self.input_context(seen, onto=x), router_input=routed, token_mask=token_mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_its_parts_wired_by_hand(dtype, training, padded):
    layer = DSCFeedForward(D, 6, **SIZES)
    by_hand = ByHand()
    for contexts in ("router_context", "input_context"):
        assert torch.equal(getattr(layer, contexts).weight, getattr(by_hand, contexts).weight)
    assert torch.equal(layer.dsc.gamma, by_hand.layer.dsc.gamma)
    layer = make_layer(dtype=dtype, budget=40.0).train(training)
    by_hand.to(dtype).train(training)
    by_hand.load_state_dict(
        {name if "context" in name else f"layer.{name}": value for name, value in layer.state_dict().items()}
    )
    x, embeddings = tokens(2, 7, dtype=dtype)
    mask = left_padded(7, 4) if padded else None
    found = []
    for module in (layer, by_hand):
        y = module(x, embeddings, mask)
        found.append([y])
        if training:
            terms = regularization(module)
            gradients = torch.autograd.grad(y.square().sum() + terms.total, [*module.parameters()])
            named = zip((name for name, _ in module.named_parameters()), gradients, strict=True)
            found[-1] += [terms.as_dict(), {name.removeprefix("layer."): value for name, value in named}]
    ours, theirs = found
    assert torch.equal(ours[0], theirs[0])
    if training:
        assert ours[1] == theirs[1]
        assert min(ours[1][name] for name in ("aux", "budget", "z")) > 0
        assert ours[2].keys() == theirs[2].keys()
        assert all(torch.equal(gradient, theirs[2][name]) for name, gradient in ours[2].items())


def test_embeddings_that_are_normalised_already():
    layer = make_layer()
    x, embeddings = tokens(2, 5)
    once = functional.layer_norm(embeddings, (D,))
    told = DSCFeedForward(D, 6, normalize_embeddings=False, dtype=torch.float64, **SIZES)
    told.load_state_dict(layer.state_dict())
    assert torch.equal(told(x, once), layer(x, embeddings))
    assert not torch.allclose(told(x, embeddings), layer(x, embeddings))


@pytest.mark.parametrize("chunks", [[1] * 9, [4, 5], [2, 1, 6], [9], [0, 3, 0, 6]], ids=str)
@pytest.mark.parametrize("shape", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("context", CONTEXTS)
def test_in_chunks_with_state_equals_one_pass(context, shape, chunks):
    layer = make_layer(**CONTEXTS[context]).eval()
    (x, embeddings), seen = tokens(*shape, 9), ids(*shape, 9)
    state = layer.initial_state(*shape)
    features = D + 4 if "n-grams" in context else D
    assert state.shape == (*shape, layer.context.past_tokens, features)
    parts = []
    split = (x.split(chunks, -2), embeddings.split(chunks, -2), seen.split(chunks, -1))
    for some_x, some_embeddings, some in zip(*split, strict=True):
        y, state = layer(some_x, some_embeddings, tokens=some, state=state)
        assert state.shape == (*shape, layer.context.past_tokens, features)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, -2), layer(x, embeddings, tokens=seen), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunks", [[1] * 9, [4, 5], [7, 2]], ids=str)
@pytest.mark.parametrize("context", CONTEXTS)
def test_left_padding_in_chunks_is_as_if_it_were_not_there(context, chunks):
    layer = make_layer(**CONTEXTS[context]).eval()
    (x, embeddings), seen = tokens(3, 9), ids(3, 9)
    lengths = [9, 5, 1]
    mask = left_padded(*lengths)
    # Padding may hold anything.
    x[~mask], embeddings[~mask] = torch.nan, torch.nan
    state, parts = layer.initial_state(3), []
    for *inputs, some in zip(*(each.split(chunks, 1) for each in (x, embeddings, mask, seen)), strict=True):
        y, state = layer(*inputs, tokens=some, state=state)
        parts.append(y)
    y, whole = torch.cat(parts, 1), layer(x, embeddings, mask, tokens=seen)
    torch.testing.assert_close(y[mask], whole[mask], rtol=1e-12, atol=1e-12)
    for row, length in enumerate(lengths):
        alone = layer(x[row, -length:], embeddings[row, -length:], tokens=seen[row, -length:])
        torch.testing.assert_close(whole[row, -length:], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("context", CONTEXTS)
def test_packed_sequences_see_nothing_of_each_other(context):
    layer = make_layer(**CONTEXTS[context]).eval()
    (x, embeddings), seen = tokens(1, 9), ids(1, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
    packed = layer(x, embeddings, tokens=seen, positions=positions)
    parts = zip(*(each.split([4, 2, 3], 1) for each in (x, embeddings, seen)), strict=True)
    alone = [layer(a, b, tokens=c) for a, b, c in parts]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-12, atol=1e-12)
    if layer.context.past_tokens:
        assert not torch.allclose(packed[:, 4:], layer(x, embeddings, tokens=seen)[:, 4:])
    # The second begins in the middle of a chunk, and the state is of another's tokens at the start of the third.
    state, parts = layer.initial_state(1), []
    for *inputs, some, places in zip(
        *(each.split([5, 1, 3], 1) for each in (x, embeddings, seen, positions)), strict=True
    ):
        y, state = layer(*inputs, tokens=some, positions=places, state=state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), packed, rtol=1e-12, atol=1e-12)
    x[:, :4], embeddings[:, :4] = torch.nan, torch.nan
    assert torch.equal(layer(x, embeddings, tokens=seen, positions=positions)[:, 4:], packed[:, 4:])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("static", ["dense", "gated"])
def test_ngrams_equal_parts_wired_by_hand(static, training):
    layer = make_layer(**NGRAMS, static=static, salt=3, ngram_orders=(1, 3)).train(training)
    (x, embeddings), seen, mask = tokens(2, 7), ids(2, 7), left_padded(7, 4)
    e = functional.layer_norm(embeddings, (D,)).masked_fill(~mask.unsqueeze(-1), 0.0)
    assert layer.dsc.router.salt == 3
    routing = layer.dsc.route(ngram_codes(seen.masked_fill(~mask, -1), (1, 3)), mask)
    mixed = layer.input_context(e, onto=x)
    assert isinstance(layer.base, GatedFFN if static == "gated" else DenseFFN)
    # The router's convolution is for the gate alone.
    assert (layer.router_context is not None) == (static == "gated")
    base = layer.base(mixed, router_input=layer.router_context(e)) if static == "gated" else layer.base(mixed)
    expected = base + layer.dsc(mixed, mask, routing=routing)
    y = layer(x, embeddings, mask, tokens=seen)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    if training:
        y.square().sum().backward()
        assert all(parameter.grad.any() for parameter in layer.parameters())


def test_salt_gives_other_atoms():
    layer, other = make_layer(**NGRAMS), make_layer(**NGRAMS, salt=1)
    other.load_state_dict(layer.state_dict())
    (x, embeddings), seen = tokens(2, 7), ids(2, 7)
    assert not torch.allclose(other(x, embeddings, tokens=seen), layer(x, embeddings, tokens=seen))
    other.dsc.router.salt = 0
    assert torch.equal(other(x, embeddings, tokens=seen), layer(x, embeddings, tokens=seen))


def test_a_bfloat16_state_holds_whole_ids():
    layer = make_layer(dtype=torch.bfloat16, **NGRAMS).eval()
    (x, embeddings), seen = tokens(2, 9, dtype=torch.bfloat16), ids(2, 9)
    routed = []
    layer.dsc.router.register_forward_hook(lambda module, args, found: routed.append(found.indices))
    layer(x, embeddings, tokens=seen)
    state = layer.initial_state(2)
    for t in range(9):
        _, state = layer(x[:, t : t + 1], embeddings[:, t : t + 1], tokens=seen[:, t : t + 1], state=state)
    assert torch.equal(torch.stack(routed[1:], 1).flatten(0, 1), routed[0])


def test_embeddings_that_nothing_sees_are_not_asked_for():
    layer = make_layer(**NGRAMS, input_context=1)
    (x, embeddings), seen = tokens(2, 5), ids(2, 5)
    assert torch.equal(layer(x, tokens=seen), layer(x, embeddings, tokens=seen))


def test_padding_that_is_not_finite_spoils_no_gradient():
    layer = make_layer(hidden_features=0)
    x, embeddings = tokens(2, 6)
    mask = left_padded(6, 3)
    gradients = []
    for padding in (0.0, torch.nan):
        x[~mask], embeddings[~mask] = padding, padding
        y = layer(x, embeddings, mask)
        loss = y[mask].square().sum() + regularization(layer).total
        gradients.append(torch.autograd.grad(loss, [*layer.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0])


def test_without_a_static_layer_and_with_one_of_ones_own():
    layer = make_layer(hidden_features=0)
    x, embeddings = tokens(2, 5)
    assert layer.base is None
    assert sum(p.numel() for p in layer.parameters()) == 11 * 3 * D + D + 7 * D
    base = torch.nn.Sequential(torch.nn.Linear(D, 5), torch.nn.Tanh(), torch.nn.Linear(5, D)).double()
    other = DSCFeedForward(D, base=base, dtype=torch.float64, **SIZES)
    other.load_state_dict(layer.state_dict(), strict=False)
    assert other.base is base
    mixed = layer.input_context(functional.layer_norm(embeddings, (D,)), onto=x)
    torch.testing.assert_close(other(x, embeddings), base(mixed) + layer(x, embeddings), rtol=1e-12, atol=1e-12)


def test_a_shared_bank_is_a_tied_module():
    bank = BasisBank(11, D, dtype=torch.float64)
    model = torch.nn.ModuleList(make_layer(bank=bank) for _ in range(2))
    own = [name for name, _ in model[0].named_parameters()]
    assert sum(p.numel() for p in model.parameters()) == 2 * sum(p.numel() for p in model[0].parameters()) - 22 * D
    whole, alone = copy.deepcopy(model), copy.deepcopy(model[1])
    assert whole[0].dsc.bank is whole[1].dsc.bank
    assert whole[0].dsc.bank is not bank
    assert alone.dsc.bank is not bank
    assert [name for name, _ in alone.named_parameters()] == own
    x, embeddings = tokens(2, 5)
    for copied in (whole[1], alone):
        assert torch.equal(copied(x, embeddings), model[1](x, embeddings))
        (copied(x, embeddings).sum() + regularization(copied).total).backward()
        assert copied.dsc.bank.u.grad.any()
    assert bank.u.grad is None
    assert set(alone.state_dict()) == set(own)
    fresh = torch.nn.ModuleList(make_layer(bank=tied) for tied in [BasisBank(11, D, dtype=torch.float64)] * 2)
    fresh.load_state_dict(model.state_dict())
    assert fresh[0].dsc.bank is fresh[1].dsc.bank
    assert torch.equal(fresh[0](x, embeddings), model[0](x, embeddings))


def test_state_dict():
    layer, fresh = make_layer(), make_layer()
    assert set(layer.state_dict()) == {
        "base.up.weight",
        "base.down.weight",
        "dsc.bank.u",
        "dsc.bank.v",
        "dsc.router.weight",
        "dsc.gamma",
        "router_context.weight",
        "input_context.weight",
    }
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    x, embeddings = tokens(2, 5)
    assert torch.equal(fresh(x, embeddings), layer(x, embeddings))


def test_new_parameters_and_states_are_where_and_what_they_are_told():
    layer = DSCFeedForward(D, 6, device="meta", dtype=torch.bfloat16, **SIZES)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
    state = layer.initial_state(2)
    assert (state.device.type, state.dtype) == ("meta", torch.bfloat16)
    assert not DSCFeedForward(D, **SIZES).initial_state(2).any()


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_compiles_whole(training):
    torch._dynamo.reset()
    layer = make_layer(dtype=torch.float32).train(training)
    state = torch.randn(2, 3, D)

    def step(x, embeddings, mask):
        y, following = layer(x, embeddings, mask, state=state)
        # Routers see zeros of padding after padding: what they select there is arbitrary.
        y = y.masked_fill(~mask.unsqueeze(-1), 0.0)
        z = layer(x, embeddings)
        return y, following, z, regularization(layer).total if training else torch.zeros(())

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for lengths in ((7, 4), (9, 2)):
        inputs = (*tokens(2, max(lengths), dtype=torch.float32), left_padded(*lengths))
        results = []
        for function in (step, compiled):
            found = function(*inputs)
            loss = sum(each.square().sum() for each in found)
            results.append([*found, *torch.autograd.grad(loss, [*layer.parameters()])])
        torch.testing.assert_close(results[1], results[0])


def test_checkpoints_give_the_same_gradients():
    layer = make_layer()
    x, embeddings = (each.requires_grad_() for each in tokens(2, 5))
    results = []
    for run in (layer, lambda *inputs: checkpoint(layer, *inputs, use_reentrant=False)):
        y = run(x, embeddings)
        terms = regularization(layer)
        gradients = torch.autograd.grad(y.square().sum() + terms.total, [x, embeddings, *layer.parameters()])
        results.append((terms.as_dict(), gradients))
        assert len(layer.dsc.statistics_log) == 0
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_bfloat16():
    layer = make_layer(dtype=torch.float32).bfloat16().eval()
    x, embeddings = tokens(4, 9, dtype=torch.bfloat16)
    y, state = layer(x, embeddings, state=layer.initial_state(4))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.bfloat16)
    precise = copy.deepcopy(layer).double()
    # The embeddings that layers see are rounded: the selection is that of the rounded ones.
    seen = functional.layer_norm(embeddings, (D,)).double()
    precise.normalize_embeddings = False
    expected = precise(x.double(), seen)
    assert (y.double() - expected).abs().max() < 2e-2 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    layer = make_layer(dtype=torch.float32)
    x, embeddings = tokens(2, 6, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = layer(x, embeddings, state=layer.initial_state(2))
        (y.float().square().sum() + regularization(layer).total).backward()
    assert y.dtype == dtype
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in layer.parameters())
    expected = layer(x.float(), embeddings.float())
    assert (y - expected).abs().max() < 5e-2 * expected.abs().max()


X, E = torch.zeros(2, 5, D), torch.zeros(2, 5, D)


@pytest.mark.parametrize(
    ("inputs", "keywords", "match"),
    [
        ((X,), {}, r"embeddings must have the shape of x, \(2, 5, 8\), got None"),
        ((X, E[:1]), {}, r"embeddings must have the shape of x, \(2, 5, 8\), got \(1, 5, 8\)"),
        ((X[..., :7], E[..., :7]), {}, r"x must have shape \(..., T, features = 8\), got \(2, 5, 7\)"),
        ((X[0, 0], E[0, 0]), {}, r"x must have shape \(..., T, features = 8\), got \(8,\)"),
        ((X, E, torch.ones(2, 4)), {}, r"token_mask must have shape \(2, 5\), got \(2, 4\)"),
        ((X, E, torch.ones(5)), {}, r"token_mask must have shape \(2, 5\), got \(5,\)"),
        ((X, E), {"positions": torch.zeros(2, 4)}, r"positions must broadcast to \(2, 5\), got shape \(2, 4\)"),
        ((X, E), {"state": torch.zeros(3, 3, D)}, r"state must have shape \(2, 3, 8\), got \(3, 3, 8\)"),
        ((X, E), {"state": torch.zeros(2, 2, D)}, r"state must have shape \(2, 3, 8\), got \(2, 2, 8\)"),
    ],
)
def test_wrong_shapes(inputs, keywords, match):
    layer = make_layer(dtype=torch.float32)
    with pytest.raises(ValueError, match=match):
        layer(*inputs, **keywords)


@pytest.mark.parametrize(
    ("seen", "error", "match"),
    [
        (None, ValueError, r"tokens must have shape \(2, 5\) for router = 'ngram', got None"),
        (torch.zeros(2, 4).long(), ValueError, r"tokens must have shape \(2, 5\) for router = 'ngram', got \(2, 4\)"),
        (torch.zeros(2, 5), TypeError, r"tokens must be int64, got torch\.float32"),
    ],
)
def test_wrong_tokens(seen, error, match):
    with pytest.raises(error, match=match):
        make_layer(dtype=torch.float32, **NGRAMS)(X, E, tokens=seen)


def test_wrong_positions_of_ngrams():
    layer = make_layer(dtype=torch.float32, **NGRAMS)
    with pytest.raises(ValueError, match=r"positions must have shape \(\.\.\., 5\), got \(4,\)"):
        layer(X, E, tokens=torch.zeros(2, 5).long(), positions=torch.arange(4))


def test_wrong_dtypes():
    layer = make_layer(dtype=torch.float32)
    with pytest.raises(TypeError, match=r"embeddings must have the dtype of x, torch.float32, got torch.float64"):
        layer(X, E.double())
    with pytest.raises(TypeError, match=r"x must have the dtype of the parameters, torch.float32, got torch.float64"):
        layer(X.double(), E.double())


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"num_atom": 11}, TypeError, "num_atom"),
        ({"top_k": 3}, TypeError, "num_atoms"),
        ({"num_atoms": 11}, ValueError, "top_k must be at most num_atoms = 11, got 32"),
        ({"num_atoms": 11.0}, TypeError, "num_atoms must be an int, got 11.0"),
        ({"router_context": 0, **SIZES}, ValueError, "router_context must be >= 1, got 0"),
        ({"router_input": "tokens", **SIZES}, ValueError, r"router_input must be one of .*, got 'tokens'"),
        (
            {"router_input": "hidden", **SIZES},
            ValueError,
            "router_input must be 'embeddings' for contexts of layer and",
        ),
        ({"features": 0, **SIZES}, ValueError, "features must be >= 1, got 0"),
        ({"hidden_features": -1, **SIZES}, ValueError, "hidden_features must be >= 0, got -1"),
        ({"hidden_features": 2.0, **SIZES}, TypeError, "hidden_features must be an int, got 2.0"),
        ({"normalize_embeddings": 1, **SIZES}, TypeError, "normalize_embeddings must be a bool, got 1"),
        ({"base": "relu", **SIZES}, TypeError, "base must be a Module or None"),
        (
            {"base": torch.nn.Identity(), "hidden_features": 4, **SIZES},
            ValueError,
            "hidden_features must be 0 where base is given, got 4",
        ),
        ({"bank": BasisBank(11, 4), **SIZES}, ValueError, r"bank must have \(num_atoms, in_features, out_features\)"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        DSCFeedForward(**{"features": D, **arguments})

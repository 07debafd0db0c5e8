"""Each regulariser against its equation, and their weight however a step is cut up."""

import copy
import gc
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import torchdsc
from torchdsc import DSC, BasisBank, Residual, frame_regularization, regularization, synchronize_regularization
from torchdsc.baselines import DenseFFN
from torchdsc.losses import aux_loss, budget_loss, frame_loss, frame_potential, z_loss
from torchdsc.nn import forget_statistics

ONLY = {"aux_weight": 0.0, "budget_weight": 0.0, "frame_weight": 0.0, "z_weight": 0.0}
TERMS = ("aux", "budget", "frame", "z")


class Model(torch.nn.Module):
    """Two DSC blocks, float64."""

    def __init__(self, **options):
        super().__init__()
        options = {"num_atoms": 14, "top_k": 3, "budget": 5.0} | options
        self.blocks = torch.nn.ModuleList(Residual(DenseFFN(6, 8), DSC(6, **options)) for _ in range(2))
        self.double()
        for block in self.blocks:
            torch.nn.init.normal_(block.dsc.router.weight, std=0.5)

    def forward(self, x, mask=None, reentrant=None):
        for block in self.blocks:
            if reentrant is None:
                x = block(x, token_mask=mask)
            else:
                x = checkpoint(lambda x, b=block: b(x, token_mask=mask), x, use_reentrant=reentrant)
        return x


def gradients(model):
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_same(actual, expected, tolerance=1e-12):
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() <= tolerance * e.abs().max().clamp_min(1e-3)


def literal_terms(layer, x):
    """Equations (9) to (12), as written."""
    logits = layer.router(x).clamp(-20, 20)
    probability = logits.softmax(-1).mean(0)
    strength = layer.route(x).strength.mean()
    frame = torch.zeros((), dtype=x.dtype)
    for rows in layer.bank.unit():
        for i in range(rows.shape[0]):
            for j in range(rows.shape[0]):
                frame = frame + (rows[i] @ rows[j]) ** 2 * (i != j)
    return {
        "aux": len(probability) * probability.square().sum(),
        "budget": torch.relu(layer.options.budget - strength) ** 2,
        "frame": frame,
        "z": logits.logsumexp(-1).square().mean(),
    }


@pytest.mark.parametrize("term", [*TERMS, "total"])
def test_equals_the_equations_with_gradients(term):
    weights = {"aux_weight": 0.3, "budget_weight": 0.2, "frame_weight": 0.05, "z_weight": 0.7}
    kept = weights if term == "total" else ONLY | {f"{term}_weight": 1.0}
    layer = DSC(6, num_atoms=14, top_k=3, budget=5.0, **kept).double()
    torch.nn.init.normal_(layer.router.weight, std=0.5)
    x = torch.randn(25, 6, dtype=torch.float64)
    terms = literal_terms(layer, x)
    expected = sum(kept[f"{name}_weight"] * value for name, value in terms.items())
    expected.backward()
    wanted = gradients(layer)
    layer.zero_grad()
    y = layer(x)
    collected = regularization(layer) if term != "frame" else None
    total = collected.total if collected else frame_regularization(layer)
    torch.testing.assert_close(total, expected.detach(), rtol=1e-12, atol=0)
    if collected:
        for name in TERMS:
            if kept[f"{name}_weight"] > 0:
                torch.testing.assert_close(getattr(collected, name), terms[name].detach(), rtol=1e-12, atol=1e-15)
                assert not getattr(collected, name).requires_grad
    (total + 0.0 * y.sum()).backward()
    assert_same(gradients(layer), wanted, 1e-10)


@pytest.mark.parametrize("shape", [(14, 6), (3, 6), (1, 6)])
def test_frame_potential_gradcheck(shape):
    rows = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(frame_potential, (rows,))


def test_values_by_hand():
    assert aux_loss(torch.full((8,), 2.5), 20) == 1.0
    assert aux_loss(torch.tensor([20.0, 0.0]), 20) == 2.0
    assert aux_loss(torch.full((4,), 5.0), 20, load=torch.full((4,), 10.0)) == 2.0
    assert budget_loss(torch.tensor(10.0), 20, budget=1.0) == 0.25
    assert budget_loss(torch.tensor(30.0), 20, budget=1.0) == 0.0
    assert z_loss(torch.tensor(40.0), 20) == 2.0
    bank = BasisBank(4, 2)
    with torch.no_grad():
        bank.u.copy_(torch.tensor([[1.0, 0], [2, 0], [0, 1], [0, 5]]))
        bank.v.copy_(bank.u)
    torch.testing.assert_close(frame_loss(bank), torch.tensor(8.0))
    torch.testing.assert_close(frame_loss(bank, normalized=True), torch.tensor(8.0 / 12))


def make_step(num_tokens=24):
    torch.manual_seed(1)
    x = torch.randn(num_tokens, 6, dtype=torch.float64)
    return x, x.sum(1).abs()


def whole_step(model, x, mask=None, **keywords):
    model.zero_grad()
    y = model(x, mask, **keywords)
    result = regularization(model)
    (result.total + 0.0 * y.sum()).backward()
    return result, gradients(model)


@pytest.mark.parametrize("cuts", [[24], [5, 19], [6, 6, 6, 6]])
@pytest.mark.parametrize("terms", [("z",), ("z", "frame"), ("aux", "budget")])
def test_accumulation(cuts, terms):
    """z and frame: the very gradient of the whole step. aux and budget: the token-weighted mean of their values."""
    model = Model(**(ONLY | {f"{term}_weight": 0.5 for term in terms}))
    x, _ = make_step()
    model.zero_grad()
    totals = []
    for part in x.split(cuts):
        _y = model(part)
        result = regularization(model, num_tokens=24)
        result.total.backward()
        totals.append(result.total.detach())
    actual = gradients(model)
    if terms == ("aux", "budget"):
        model.zero_grad()
        for part in x.split(cuts):
            _y = model(part)
            (regularization(model).total * len(part) / 24).backward()
        expected = gradients(model)
    else:
        result, expected = whole_step(model, x)
        torch.testing.assert_close(sum(totals), result.total.detach(), rtol=1e-12, atol=0)
    assert_same(actual, expected)


def test_frame_once_a_step():
    model = Model(**(ONLY | {"z_weight": 0.5, "frame_weight": 0.5}))
    x, _ = make_step()
    _, expected = whole_step(model, x)
    model.zero_grad()
    for part in x.split(8):
        _y = model(part)
        regularization(model, num_tokens=24, frame_share=0).total.backward()
    frame_regularization(model).backward()
    assert_same(gradients(model), expected)


def test_padding_does_not_count():
    model = Model()
    x, _ = make_step()
    expected_result, expected = whole_step(model, x)
    padded = torch.cat([x, torch.randn(7, 6, dtype=torch.float64)]).view(31, 6)
    mask = torch.arange(31) < 24
    result, actual = whole_step(model, padded, mask)
    torch.testing.assert_close(result.total, expected_result.total, rtol=1e-12, atol=0)
    assert_same(actual, expected)


def test_a_batch_of_padding_alone_adds_nothing():
    model = Model(**(ONLY | {"aux_weight": 1.0, "budget_weight": 1.0, "z_weight": 1.0}))
    result, actual = whole_step(model, torch.randn(4, 6, dtype=torch.float64), torch.zeros(4, dtype=torch.bool))
    assert result.total == 0
    assert not any(g.any() for g in actual)


def test_no_tokens():
    model = Model()
    result, actual = whole_step(model, torch.zeros(0, 6, dtype=torch.float64))
    assert result.total.isfinite()
    assert all(g.isfinite().all() for g in actual)


def test_checkpointing_without_reentry_counts_once():
    model = Model()
    x, _ = make_step()
    x.requires_grad_()
    expected_result, expected = whole_step(model, x)
    model.zero_grad()
    y = model(x, reentrant=False)
    result = regularization(model)
    (result.total + 0.0 * y.sum()).backward()
    assert result.total == expected_result.total
    assert_same(gradients(model), expected)
    # The recomputed forward pass has left nothing behind.
    assert not any(len(block.dsc.statistics_log) for block in model.blocks)


def test_reentrant_checkpointing_raises():
    model = Model()
    x, _ = make_step()
    model(x.requires_grad_(), reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        regularization(model)
    # Nothing of the failed step is left: the next one is whole.
    whole_step(model, x)


def test_no_grad_forward_raises_but_frozen_router_does_not():
    model = Model()
    x, _ = make_step()
    with torch.no_grad():
        model(x)
    with pytest.raises(RuntimeError, match="no_grad"):
        regularization(model)
    for block in model.blocks:
        block.dsc.router.requires_grad_(False)
    _y = model(x)
    regularization(model)


def test_loss_scaling():
    model = Model()
    x, _ = make_step()
    _, expected = whole_step(model, x)
    model.zero_grad()
    _y = model(x)
    (regularization(model).total * 2.0**12).backward()
    assert_same([g / 2.0**12 for g in gradients(model)], expected)


@pytest.mark.slow
def test_compiled():
    torch._dynamo.reset()
    model = Model()
    x, _ = make_step()
    _, expected = whole_step(model, x)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        model.zero_grad()
        compiled(x)
        regularization(model).total.backward()
        assert_same(gradients(model), expected)


@pytest.mark.slow
def test_exported_passes_leave_nothing():
    layer, x = DSC(8, num_atoms=12, top_k=3), torch.randn(5, 8)
    torch.export.export(layer, (x,), strict=False)
    assert len(layer.statistics_log) == 0
    _y = layer(x)
    assert regularization(layer).aux >= 1


def test_shared_bank_counts_once():
    bank = BasisBank(14, 6)
    options = ONLY | {"num_atoms": 14, "top_k": 3, "frame_weight": 1.0, "z_weight": 1e-9}
    model = torch.nn.Sequential(DSC(6, bank=bank, **options), DSC(6, bank=bank, **options))
    _y = model(torch.randn(9, 6))
    torch.testing.assert_close(regularization(model).frame, frame_loss(bank).detach())


def test_a_layer_that_runs_twice_counts_both():
    layer = DSC(6, num_atoms=14, top_k=3, **(ONLY | {"z_weight": 1.0})).double()
    x, y = torch.randn(2, 9, 6, dtype=torch.float64)
    _outputs = layer(x), layer(y)
    both = regularization(layer, num_tokens=18).total
    _outputs = layer(torch.cat([x, y]))
    torch.testing.assert_close(both, regularization(layer).total, rtol=1e-12, atol=0)


def test_z_loss_on_raw_logits_brings_a_clamped_logit_back():
    layers = [
        DSC(6, num_atoms=14, top_k=3, logit_clamp=1.0, z_loss_on_raw_logits=raw, **(ONLY | {"z_weight": 1.0}))
        for raw in (False, True)
    ]
    for layer in layers:
        with torch.no_grad():
            layer.router.weight.mul_(1e6)
        _y = layer(torch.randn(9, 6))
        regularization(layer).total.backward()
    assert not layers[0].router.weight.grad.any()
    assert layers[1].router.weight.grad.any()


class TestUncollected:
    """What a forward pass leaves belongs to the graph of its output."""

    def test_a_dropped_pass_keeps_nothing_and_does_not_count(self):
        layer, x = DSC(4, num_atoms=5, top_k=2), torch.randn(3, 4)
        y = layer(x)
        expected = regularization(layer).total
        for _ in range(5):
            layer(x)
        assert len(layer.statistics_log) == 0
        y = layer(x)
        assert torch.equal(regularization(layer).total, expected)
        assert y.requires_grad

    def test_memory_does_not_grow(self):
        layer, x = DSC(4, num_atoms=5, top_k=2), torch.randn(3, 4)

        def tensors():
            gc.collect()
            return sum(isinstance(item, torch.Tensor) for item in gc.get_objects())

        layer(x)
        before = tensors()
        for _ in range(20):
            layer(x)
            with torch.no_grad():
                layer(x)
        # The values of the last pass without a graph are kept.
        assert tensors() <= before + 5

    def test_a_pass_lives_as_long_as_what_was_computed_of_it(self):
        layer = DSC(4, num_atoms=5, top_k=2)
        loss = layer(torch.randn(3, 4)).square().mean()
        assert regularization(layer).total > 0
        loss.backward()

    @pytest.mark.parametrize(
        "options", [{}, ONLY | {"frame_weight": 1.0}, ONLY | {"budget_weight": 1.0}], ids=["all", "frame", "budget"]
    )
    def test_a_backward_pass_raises(self, options):
        layer = DSC(4, num_atoms=5, top_k=2, **options)
        loss = layer(torch.randn(3, 4)).square().mean()
        with pytest.raises(RuntimeError, match=r"were not collected .* add torchdsc.regularization\(model\).total"):
            loss.backward()
        loss = layer(torch.randn(3, 4)).square().mean()
        (loss + regularization(layer).total).backward()

    def test_without_anything_to_train_it_does_not(self):
        layer = DSC(4, num_atoms=5, top_k=2)
        layer.router.requires_grad_(False)
        layer.bank.requires_grad_(False)
        layer(torch.randn(3, 4)).square().mean().backward()
        assert layer.gamma.grad.any()

    def test_frame_alone_is_collected_once_a_step(self):
        layer = DSC(4, num_atoms=5, top_k=2, **ONLY | {"frame_weight": 1.0})
        loss = layer(torch.randn(3, 4)).square().mean()
        (loss + frame_regularization(layer)).backward()

    def test_forgetting_says_that_none_is_wanted(self):
        layer = DSC(4, num_atoms=5, top_k=2)
        loss = layer(torch.randn(3, 4)).square().mean()
        forget_statistics(layer)
        loss.backward()
        assert len(layer.statistics_log) == 0

    def test_reentrant_checkpointing_raises_though_nobody_collects(self):
        model, (x, _) = Model(), make_step()
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            model(x.requires_grad_(), reentrant=True).sum().backward()

    def test_checkpointing_without_reentry_raises_too(self):
        model, (x, _) = Model(), make_step()
        with pytest.raises(RuntimeError, match="were not collected"):
            model(x.requires_grad_(), reentrant=False).sum().backward()

    def test_a_pass_without_gradients_does_not_count_in_the_next_loss(self):
        model, (x, _) = Model(), make_step()
        expected, _ = whole_step(model, x)
        with torch.no_grad():
            model(x)
            values = regularization(model)
            model(x)
        result, _ = whole_step(model, x)
        assert torch.equal(result.total, expected.total)
        torch.testing.assert_close(values.total, expected.total)

    def test_two_backward_passes_through_one_graph(self):
        layer = DSC(4, num_atoms=5, top_k=2)
        y = layer(torch.randn(3, 4))
        regularization(layer)
        y.sum().backward(retain_graph=True)
        y.sum().backward()


class TestUnadded:
    """Collected, and then left out of the loss."""

    def test_warns_once(self):
        layer, x = DSC(8, num_atoms=20, top_k=3), torch.randn(5, 8)
        y = layer(x)
        regularization(layer)
        with pytest.warns(RuntimeWarning, match="were collected, but a backward pass goes through"):
            y.square().sum().backward(retain_graph=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            y.sum().backward()

    @pytest.mark.parametrize("way", ["sum", "before", "scaled by zero", "accumulated", "checkpointed", "forgotten"])
    def test_these_do_not(self, way):
        layer, x = DSC(8, num_atoms=20, top_k=3), torch.randn(5, 8, requires_grad=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            y = checkpoint(layer, x, use_reentrant=False) if way == "checkpointed" else layer(x)
            if way == "forgotten":
                forget_statistics(layer)
                y.sum().backward()
                return
            if way == "accumulated":
                y = y + layer(x + 1)
            total = regularization(layer).total
            # The task's loss is computed after it, so that its nodes are the later ones.
            loss = y.square().sum().exp().log()
            if way == "before":
                total.backward(retain_graph=True)
                loss.backward()
            else:
                (loss + (0.0 if way == "scaled by zero" else 1.0) * total).backward()


def test_evaluation_and_zero_weights_keep_nothing():
    x = torch.randn(3, 4)
    evaluated, unweighted = DSC(4, num_atoms=5, top_k=2).eval(), DSC(4, num_atoms=5, top_k=2, **ONLY)
    outputs = evaluated(x), unweighted(x)
    assert len(evaluated.statistics_log) == len(unweighted.statistics_log) == 0
    sum(output.sum() for output in outputs).backward()


def test_without_weights_there_is_nothing_to_add():
    layer = DSC(4, num_atoms=6, top_k=3, router="ngram", frame_weight=0.0)
    terms = regularization(layer)
    assert set(terms.as_dict().values()) == {0.0}
    (torch.ones((), requires_grad=True) + terms.total).backward()


def test_collection_errors():
    for collect in (regularization, synchronize_regularization):
        with pytest.raises(ValueError, match="model must hold a DSC or other routed layer, got Linear without one"):
            collect(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="must have run in training"):
        regularization(DSC(4, num_atoms=5, top_k=2))


def test_as_dict():
    layer = DSC(4, num_atoms=5, top_k=2)
    _y = layer(torch.randn(3, 4))
    values = regularization(layer).as_dict()
    assert set(values) == {*TERMS, "total"}
    assert all(isinstance(v, float) for v in values.values())


def test_public_names():
    assert set(torchdsc.__all__) <= set(dir(torchdsc))
    assert all(getattr(torchdsc, name).__module__.startswith("torchdsc.") for name in torchdsc.__all__)
    assert torchdsc.diagnostics.sensitivity
    assert torchdsc.baselines.PEER
    with pytest.raises(AttributeError, match="module 'torchdsc' has no attribute 'DSD'"):
        torchdsc.DSD  # noqa: B018
    assert copy.copy(torchdsc.Regularization)

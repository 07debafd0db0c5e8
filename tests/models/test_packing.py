"""Sequences packed in one row, by their positions: none sees another, padded or not, whatever the cache."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from torchdsc.models.packing import number_sequences
from torchdsc.nn.packing import find_places

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
# Lengths of the sequences in a row of twelve.
LENGTHS = (1, 5, 2, 4)


def positions_of(lengths):
    return torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)


def check_alone(model, input_ids, logits, starts, lengths):
    """Each sequence's logits are those that it has alone."""
    for start, length in zip(starts, lengths, strict=True):
        piece = slice(start, start + length)
        alone = model(input_ids[:, piece], use_cache=False).logits
        torch.testing.assert_close(logits[:, piece], alone, **CLOSE)


def check_beside_padding(side, filler, model, input_ids):
    padding = torch.full((2,), filler)
    first, second = torch.arange(4), torch.arange(6)
    pieces = {"left": (padding, first, second), "right": (first, second, padding), "between": (first, padding, second)}
    starts = {"left": (2, 6), "right": (0, 4), "between": (0, 6)}[side]
    mask = torch.zeros(1, 12, dtype=torch.long)
    for start, length in zip(starts, (4, 6), strict=True):
        mask[:, start : start + length] = 1
    positions = torch.cat(pieces[side]).unsqueeze(0)
    logits = model(input_ids, attention_mask=mask.expand(3, -1), position_ids=positions).logits
    check_alone(model, input_ids, logits, starts, (4, 6))


@pytest.mark.parametrize(
    ("masked", "use_cache", "training"),
    [(False, None, False), (False, True, True), (True, None, False), (True, False, True)],
)
def test_see_nothing_of_each_other(masked, use_cache, training, kind, make_model, input_ids):
    model = make_model(kind).train(training)
    given = {"attention_mask": torch.ones_like(input_ids)} if masked else {}
    output = model(input_ids, position_ids=positions_of(LENGTHS), use_cache=use_cache, **given)
    check_alone(model, input_ids, output.logits, (0, 1, 6, 8), LENGTHS)


@pytest.mark.parametrize("masked", [False, True])
def test_sequences_may_begin_at_any_position(masked, kind, make_model, input_ids):
    model, positions = make_model(kind), torch.cat([torch.arange(5), torch.arange(3, 10)]).unsqueeze(0)
    given = {"attention_mask": torch.ones_like(input_ids)} if masked else {}
    packed = model(input_ids, position_ids=positions, **given).logits
    for piece in (slice(0, 5), slice(5, 12)):
        alone = model(input_ids[:, piece], position_ids=positions[:, piece]).logits
        torch.testing.assert_close(packed[:, piece], alone, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right", "between"])
@pytest.mark.parametrize("filler", [0, 1], ids=["zeros", "ones"])
def test_beside_padding(side, filler, routed_kind, make_model, input_ids):
    check_beside_padding(side, filler, make_model(routed_kind), input_ids)


@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_beside_padding_by_eager_attention(side, make_model, input_ids):
    model = make_model("dsc, embeddings")
    model.set_attn_implementation("eager")
    check_beside_padding(side, 1, model, input_ids)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", [[0, 1, 2, 2, 3, 4], [0, 1, 2, 3, 4, 5], [0, 1, 2, 1, 3, 4], [0, 1, 2, 0, 4, 5]])
def test_a_hole_in_the_mask_begins_no_sequence(positions, attention, make_model, input_ids):
    model = make_model("dense")
    model.set_attn_implementation(attention)
    mask, positions = torch.ones(1, 6, dtype=torch.long), torch.tensor([positions])
    mask[:, 3] = 0
    kept = torch.tensor([0, 1, 2, 4, 5])
    holed = model(input_ids[:1, :6], attention_mask=mask, position_ids=positions).logits[:, kept]
    alone = model(input_ids[:1, kept], position_ids=positions[:, kept], attention_mask=mask[:, kept]).logits
    torch.testing.assert_close(holed, alone, **CLOSE)


def test_rows_may_be_longer_than_the_positions(kind, make_model, input_ids):
    model = make_model(kind, max_position_embeddings=5)
    for given in (
        {},
        {"attention_mask": torch.ones_like(input_ids)},
        {"past_key_values": DynamicCache(config=model.config)},
    ):
        logits = model(input_ids, position_ids=positions_of(LENGTHS), **given).logits
        check_alone(model, input_ids, logits, (0, 1, 6, 8), LENGTHS)
    model.train()
    model(input_ids, position_ids=positions_of(LENGTHS), labels=input_ids).loss.backward()


def test_left_padded_generation_may_be_longer_than_the_positions(make_model, input_ids):
    model = make_model("dsc", max_position_embeddings=10)
    mask = (torch.arange(12) >= 8).long().expand(3, -1)
    generated = model.generate(input_ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    alone = model.generate(input_ids[:, 8:], max_new_tokens=5, do_sample=False)
    assert torch.equal(generated[:, 8:], alone)


def test_flattened_batches_of_transformers(make_model):
    pytest.importorskip("accelerate")
    from transformers import DataCollatorWithFlattening

    model = make_model("dsc", max_position_embeddings=6).train()
    examples = [{"input_ids": torch.randint(1, 61, (n,)).tolist()} for n in (6, 3, 5)]
    batch = DataCollatorWithFlattening()(examples)
    loss = model(**batch).loss
    losses = [
        model(**{k: v.unsqueeze(0) for k, v in e.items()}, labels=e["input_ids"].unsqueeze(0))
        for e in ({"input_ids": torch.tensor(example["input_ids"])} for example in examples)
    ]
    counts = torch.tensor([5.0, 2.0, 4.0])
    model.eval()
    expected = (torch.stack([output.task_loss for output in losses]) * counts).sum() / counts.sum()
    torch.testing.assert_close(model(**batch).loss, expected)
    assert loss.isfinite()


class TestErrors:
    @pytest.mark.parametrize("wrong", [-1, 24, 100])
    @pytest.mark.parametrize("training", [False, True])
    def test_positions_that_there_are_not(self, training, wrong, make_model, input_ids):
        model = make_model("dsc").train(training)
        positions = torch.arange(12).unsqueeze(0)
        positions[0, 5] = wrong
        match = rf"position_ids must be in \[0, max_position_embeddings = 24\), got .*{wrong}"
        with pytest.raises(ValueError, match=match):
            model(input_ids, position_ids=positions)

    @pytest.mark.parametrize("mask", [False, True])
    def test_a_cache_goes_on_with_one_sequence(self, mask, make_model, input_ids):
        model = make_model("dsc")
        cache = model(input_ids).past_key_values
        given = {"attention_mask": torch.ones(3, 17)} if mask else {}
        more = model(input_ids[:, :5], position_ids=torch.arange(12, 17).unsqueeze(0), past_key_values=cache, **given)
        full = model(torch.cat([input_ids, input_ids[:, :5]], 1)).logits
        torch.testing.assert_close(more.logits, full[:, 12:], **CLOSE)
        static = StaticCache(config=model.config, max_cache_len=20)
        for held, given in ((cache, {}), (static, {}), (static, {"attention_mask": torch.ones(3, 12)})):
            with pytest.raises(ValueError, match="position_ids must go on from token to token"):
                model(input_ids, position_ids=positions_of(LENGTHS), past_key_values=held, **given)


def test_numbers_of_sequences():
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 1]]).bool()
    positions = torch.tensor([[7, 3, 4, 0, 5, 0, 0, 1]])
    assert number_sequences(positions, mask).tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]]
    assert number_sequences(torch.tensor([[0, 1, 2]]), None) is None
    assert number_sequences(torch.tensor([[0, 0, 1]]), None).tolist() == [[0, 1, 1]]


def test_places_in_sequences():
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 1]]).bool()
    positions = torch.tensor([[7, 3, 4, 0, 5, 2, 0, 3]])
    # The first sequence may go on with one in a cache.
    assert find_places(positions, mask, 4).tolist() == [[4, 5, 6, 7, 8, 0, 1, 2]]
    assert find_places(torch.tensor([[5, 5, 7], [0, 1, 2]]), None, 2).tolist() == [[2, 0, 1], [2, 3, 4]]
    assert find_places(torch.tensor([[4, 5, 6]]), None, 2) is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dsc", "dsc, embeddings"])
@pytest.mark.parametrize("mask", [False, True])
def test_compiles_to_one_graph(mask, kind, make_model, input_ids):
    model = make_model(kind)
    given = {"attention_mask": torch.ones_like(input_ids)} if mask else {}
    arguments = {"position_ids": positions_of(LENGTHS), "use_cache": False, **given}
    torch._dynamo.reset()
    actual = torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids, **arguments).logits
    torch.testing.assert_close(actual, model(input_ids, **arguments).logits, **CLOSE)

"""What a model returns beside logits: hidden states, attention weights and a cache, as transformers' own models do."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture
def make_llama():
    """The yardstick, of the same sizes."""

    def make(attention):
        sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=8, attn_implementation=attention)).eval()

    return make


def shapes(values):
    return None if values is None else [None if value is None else tuple(value.shape) for value in values]


@pytest.mark.parametrize("where", ["config", "argument"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["hidden_states", "attentions"])
def test_are_asked_for_by_config_or_argument(name, where, training, kind, make_model, make_llama, input_ids):
    found = []
    for model in (make_model(kind), make_llama("eager")):
        model.set_attn_implementation("eager")
        model.train(training)
        flag = f"output_{name}"
        assert getattr(model(input_ids), name) is None
        if where == "config":
            setattr(model.config, flag, True)
        output = model(input_ids, **{flag: True} if where == "argument" else {})
        backbone = model.model(input_ids, **{flag: True} if where == "argument" else {})
        assert shapes(getattr(backbone, name)) == shapes(getattr(output, name))
        found.append(shapes(getattr(output, name)))
        # An argument outweighs the config.
        assert getattr(model(input_ids, **{flag: False}), name) is None
    assert found[0] == found[1]
    assert len(found[0]) == (3 if name == "hidden_states" else 2)


def test_hidden_states_are_those_before_each_block_and_after_the_last(make_model, input_ids):
    model = make_model("dsc")
    output = model.model(input_ids, output_hidden_states=True)
    embedded = model.model.embed_tokens(input_ids) + model.model.embed_positions.weight[:12]
    assert torch.equal(output.hidden_states[0], embedded)
    assert torch.equal(output.hidden_states[1], model.model.blocks[0](embedded)[0])
    assert output.hidden_states[-1] is output.last_hidden_state


def test_attention_weights_are_those_of_eager_attention(make_model, input_ids):
    model = make_model("dsc")
    model.set_attn_implementation("eager")
    weights = model(input_ids, output_attentions=True).attentions
    for weight in weights:
        torch.testing.assert_close(weight.sum(-1), torch.ones(3, 2, 12))
        assert not weight.triu(1).any()


def test_attention_weights_of_another_implementation(make_model, make_llama, input_ids):
    """SDPA has none: nothing by the argument, an error by the config, as everywhere in transformers."""
    for model in (make_model("dsc"), make_llama("sdpa")):
        assert model(input_ids, output_attentions=True).attentions == ()
        with pytest.raises(ValueError, match="eager"):
            model.config.output_attentions = True


class TestCache:
    def test_in_training_on_request(self, kind, make_model, input_ids):
        model = make_model(kind).train()
        assert model(input_ids, labels=input_ids).past_key_values is None
        loss = model(input_ids, labels=input_ids).loss
        cached = model(input_ids, labels=input_ids, use_cache=True)
        assert cached.past_key_values.get_seq_length() == 12
        torch.testing.assert_close(cached.loss, loss)
        parameters = list(model.parameters())
        expected, actual = (torch.autograd.grad(y, parameters, allow_unused=True) for y in (loss, cached.loss))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

    def test_none_under_gradient_checkpointing(self, make_model, input_ids, caplog):
        model = make_model("dsc").train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        output = model(input_ids, labels=input_ids, use_cache=True)
        assert output.past_key_values is None
        output.loss.backward()

    def test_one_that_is_given_is_returned(self, make_model, input_ids):
        model = make_model("dsc")
        cache = model(input_ids).past_key_values
        assert model(input_ids[:, :2], past_key_values=cache, use_cache=False).past_key_values is cache
        assert cache.get_seq_length() == 14

    def test_not_where_the_config_says_so(self, make_model, input_ids):
        model = make_model("dsc", use_cache=False)
        assert model(input_ids).past_key_values is None
        assert model(input_ids, use_cache=True).past_key_values is not None


@pytest.mark.slow
def test_hidden_states_compile_to_one_graph(make_model, input_ids):
    model = make_model("dsc")
    expected = model(input_ids, output_hidden_states=True, use_cache=False).hidden_states
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = compiled(input_ids, output_hidden_states=True, use_cache=False).hidden_states
    torch.testing.assert_close(actual, expected)

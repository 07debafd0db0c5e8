"""What the least torch and the newest transformers ask for, checked on the versions that are installed."""

import sys
import typing

import pytest
import torch
from transformers.cache_utils import DynamicCache

from torchdsc import DSC
from torchdsc.baselines import PEER, MixtureOfLoRAs, StandardMoE
from torchdsc.losses import regularization_of
from torchdsc.models import DSCGPTConfig, DSCGPTForCausalLM, modeling, packing


def make_model():
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return DSCGPTForCausalLM(DSCGPTConfig(**sizes, intermediate_size=8, initializer_range=0.4)).eval()


@pytest.mark.parametrize(
    "make",
    [
        lambda: DSC(8, num_atoms=25, top_k=4, activation="relu"),
        lambda: DSC(8, num_atoms=25, top_k=4, router="low_rank", z_loss_on_raw_logits=True),
        lambda: DSC(8, num_atoms=25, top_k=4, router="product_key"),
        lambda: StandardMoE(8, 6, 4),
        lambda: MixtureOfLoRAs(8, num_experts=4, rank=2),
        lambda: PEER(8, num_experts=25, aux_weight=0.1),
    ],
)
def test_no_forward_pass_asks_a_type_for_its_arguments(make):
    # torch.compile(fullgraph=True) of torch 2.6 refuses typing.get_args.
    layer, called = make(), []
    sys.setprofile(lambda frame, event, _: called.append(frame.f_code))
    try:
        routing, statistics = layer.route(torch.randn(3, 8)).take_statistics()
        layer(torch.randn(3, 8), routing=routing)
        # As regularization does when it is compiled: what checks its arguments is not.
        regularization_of([(layer, statistics)])
    finally:
        sys.setprofile(None)
    assert type(layer).forward.__code__ in called
    assert typing.get_args.__code__ not in called


def test_masks_do_not_name_the_cache(monkeypatch):
    # Transformers 5.24 calls the argument "cache", and says so when it is given by its former name.
    real, input_ids = packing.create_causal_mask, torch.arange(6).unsqueeze(0)
    model, caches = make_model(), []

    def renamed(config, inputs_embeds, attention_mask, cache, position_ids=None):
        caches.append(cache)
        return real(config, inputs_embeds, attention_mask, cache, position_ids=position_ids)

    expected = model(input_ids).logits
    monkeypatch.setattr(packing, "create_causal_mask", renamed)
    cache = DynamicCache(config=model.config)
    model(input_ids[:, :4], past_key_values=cache)
    torch.testing.assert_close(model(input_ids[:, 4:], past_key_values=cache).logits, expected[:, 4:])
    # An empty one changes no mask, and is left out.
    assert caches == [None, cache]


def test_a_cache_by_its_new_name_is_used():
    # Generation of transformers 5.24 hands it over under that name.
    model, input_ids = make_model(), torch.arange(6).unsqueeze(0)
    cache = DynamicCache(config=model.config)
    model(input_ids[:, :4], cache=cache)
    output = model(input_ids[:, 4:], cache=cache)
    torch.testing.assert_close(output.logits, model(input_ids).logits[:, 4:])
    assert getattr(output, modeling._CACHE) is cache
    assert cache.get_seq_length() == 6

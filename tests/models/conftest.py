import pytest
import torch

from torchdsc.models import DSCGPTConfig, DSCGPTForCausalLM

# The feed-forward layer, and after a comma what is special about it.
KINDS = {
    "dense": (20, {}),
    "gated": (13, {}),
    "gated, embeddings": (
        13,
        {"gate_norm": "layer", "router_input": "embeddings", "router_context": 3, "input_context": 2},
    ),
    "moe": (9, {"num_experts": 4, "top_k": 2}),
    "mixture_of_loras": (8, {"num_experts": 4, "rank": 2}),
    "peer": (8, {"num_experts": 16, "top_k": 4, "heads": 2}),
    "dsc": (8, {"num_atoms": 20, "top_k": 3}),
    "dsc, one bank": (8, {"num_atoms": 20, "top_k": 3, "share_bank": True}),
    "dsc, attention": (8, {"num_atoms": 20, "top_k": 3, "attention_rank": 2}),
    "dsc, attention and one bank": (8, {"num_atoms": 20, "top_k": 3, "attention_rank": 2, "share_bank": True}),
    "dsc, context": (8, {"num_atoms": 20, "top_k": 3, "router_context": 3}),
    "dsc, embeddings": (8, {"num_atoms": 20, "top_k": 3, "router_input": "embeddings", "router_context": 3}),
    "dense, embeddings": (20, {"input_context": 3}),
    "moe, gated": (9, {"num_experts": 4, "top_k": 2, "gated": True, "balancing": "bias", "shared_experts": 1}),
    "dense, tables": (20, {"ngram_rows": 80, "ngram_heads": 2}),
    "dsc, tables and a gated layer": (
        8,
        {"num_atoms": 20, "top_k": 3, "router_input": "embeddings", "static": "gated", "ngram_rows": 80},
    ),
    "dsc, n-grams": (
        8,
        {"num_atoms": 20, "top_k": 4, "router": "ngram", "static": "gated", "router_input": "embeddings"},
    ),
    "dsc, a gated layer": (8, {"num_atoms": 20, "top_k": 3, "static": "gated"}),
    "moe, context": (9, {"num_experts": 4, "top_k": 2, "router_context": 3}),
    "moe, embeddings": (
        9,
        {"num_experts": 4, "top_k": 2, "router_input": "embeddings", "router_context": 2, "input_context": 4},
    ),
    "mixture_of_loras, own embedding": (8, {"num_experts": 4, "rank": 2, "router_input": "embeddings"}),
}


@pytest.fixture(params=KINDS)
def kind(request):
    """Every kind of feed-forward layer."""
    return request.param


@pytest.fixture(params=[kind for kind in KINDS if not kind.startswith(("dense", "gated"))])
def routed_kind(request):
    """The kinds that route."""
    return request.param


@pytest.fixture
def make_config():
    def make(kind, *, feed_forward_options=None, **changes):
        intermediate_size, options = KINDS[kind]
        settings = {
            "vocab_size": 61,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 24,
            "dropout": 0.0,
            "intermediate_size": intermediate_size,
            # Large weights, so that logits are far from ties and every path is seen in them.
            "initializer_range": 0.3,
            "bos_token_id": 0,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        return DSCGPTConfig(
            feed_forward=kind.partition(",")[0],
            feed_forward_options={**options, **(feed_forward_options or {})},
            **{**settings, **changes},
        )

    return make


@pytest.fixture
def make_model(make_config):
    """A tiny model in evaluation mode whose LoRA update is not zero."""

    def make(kind, *, dtype=torch.float32, **changes):
        model = DSCGPTForCausalLM(make_config(kind, **changes))
        for name, parameter in model.named_parameters():
            if name.endswith("dsc.up"):
                torch.nn.init.normal_(parameter, std=0.3)
        return model.to(dtype).eval()

    return make


@pytest.fixture
def input_ids():
    """Tokens other than that of padding."""
    return torch.randint(1, 61, (3, 12))

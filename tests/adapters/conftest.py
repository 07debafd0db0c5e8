"""Tiny base models of every kind, batches for them, and adapters that do something."""

from typing import ClassVar

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from torchdsc.adapters import AdapterLayer, DSCAdapterConfig, MixtureOfLoRAsConfig
from torchdsc.models import DSCGPTConfig, DSCGPTForCausalLM

VOCAB = 64
DECODER = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 48}
COMMON = {"vocab_size": VOCAB, "hidden_size": 32, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1}
TOKENS = {"eos_token_id": 2}


class MLP(nn.Module):
    """No Hugging Face model: no config, and no loss."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.block = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))
        self.last = nn.Linear(32, 4)

    def forward(self, x):
        return self.last(self.block(self.first(x).relu()))


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=32,
            n_layer=2,
            n_head=2,
            n_positions=32,
            bos_token_id=1,
            **_dropouts("gpt2"),
            **TOKENS,
        )
    )


def llama():
    return LlamaForCausalLM(LlamaConfig(**COMMON, **TOKENS, **DECODER, max_position_embeddings=32))


def bert():
    sizes = {name: DECODER[name] for name in ("num_hidden_layers", "num_attention_heads", "intermediate_size")}
    return BertForSequenceClassification(
        BertConfig(vocab_size=VOCAB, hidden_size=32, num_labels=3, initializer_range=0.2, **sizes, **_dropouts("bert"))
    )


def t5():
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=32,
            d_ff=48,
            d_kv=16,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=2,
        )
    )


def mixtral():
    return MixtralForCausalLM(
        MixtralConfig(
            **COMMON,
            **TOKENS,
            **DECODER,
            max_position_embeddings=32,
            num_local_experts=4,
            num_experts_per_tok=2,
            output_router_logits=True,
            experts_implementation="eager",
        )
    )


def qwen_moe():
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **COMMON,
            **TOKENS,
            **DECODER,
            max_position_embeddings=32,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
            experts_implementation="eager",
        )
    )


def dscgpt():
    options = {"num_atoms": 20, "top_k": 3}
    return DSCGPTForCausalLM(
        DSCGPTConfig(
            feed_forward="dsc",
            feed_forward_options=options,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=32,
            dropout=0.0,
            eos_token_id=2,
            **COMMON,
        )
    )


def _dropouts(kind):
    names = {
        "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    }
    return dict.fromkeys(names[kind], 0.0)


BASES = {
    "mlp": MLP,
    "gpt2": gpt2,
    "llama": llama,
    "bert": bert,
    "t5": t5,
    "mixtral": mixtral,
    "qwen_moe": qwen_moe,
    "dscgpt": dscgpt,
}


@pytest.fixture
def make_base():
    """The same weights at each call."""

    def make(kind, dtype=torch.float32):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return BASES[kind]().to(dtype).eval()

    return make


@pytest.fixture
def make_batch():
    """What a model of a kind is called with: unequal padding, and labels."""

    def make(kind, dtype=torch.float32):
        generator = torch.Generator().manual_seed(2)
        if kind == "mlp":
            return {"x": torch.randn(2, 5, 16, generator=generator).to(dtype)}
        input_ids = torch.randint(3, VOCAB, (4, 8), generator=generator)
        attention_mask = torch.ones_like(input_ids)
        attention_mask[1, 5:], attention_mask[2, 3:] = 0, 0
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        if kind == "bert":
            return {**batch, "labels": torch.tensor([0, 2, 1, 2])}
        if kind == "t5":
            return {**batch, "labels": torch.randint(3, VOCAB, (4, 6), generator=generator)}
        return {**batch, "labels": input_ids.masked_fill(attention_mask == 0, -100)}

    return make


class Configs:
    """Small adapters; ``dsc`` and ``molora`` take any field."""

    CLASSES: ClassVar = {"dsc": DSCAdapterConfig, "molora": MixtureOfLoRAsConfig}
    SIZES: ClassVar = {"dsc": {"num_atoms": 9, "top_k": 2}, "molora": {"num_experts": 4, "rank": 2, "top_k": 2}}

    @classmethod
    def make(cls, method="dsc", **fields):
        return cls.CLASSES[method](**{**cls.SIZES[method], **fields})


@pytest.fixture
def make_config():
    return Configs.make


@pytest.fixture
def adapt(make_base, make_config):
    """A base model with an adapter: ``adapt("llama", target_modules=["q_proj"], ...)``."""

    def make(kind, method="dsc", *, dtype=torch.float32, peft=None, moved=False, **fields):
        base = make_base(kind, dtype)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = get_peft_model(base, make_config(method, **fields), **(peft or {}))
        # PEFT's own modules start in training mode, whatever the base.
        model.eval()
        return move(model).to(dtype) if moved else model

    return make


@pytest.fixture
def moved():
    return move


@torch.no_grad()
def move(model, name="default", scale=1.0, seed=3):
    """Give the adapters of a name updates that are felt."""
    generator = torch.Generator().manual_seed(seed)
    for layer in (module for module in model.modules() if isinstance(module, AdapterLayer)):
        if name in layer.adapters:
            for parameter_name, parameter in layer.adapters[name].named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter_name.startswith("bank"):
                    parameter.add_(noise * 0.1)
                elif parameter_name in ("gamma", "up") or "router" in parameter_name:
                    parameter.copy_(noise * scale * (0.02 if parameter_name == "gamma" else 0.3))
    return model


@pytest.fixture
def output():
    """Logits, or the output itself."""

    def call(model, batch, **options):
        with torch.no_grad():
            result = model(**batch, **options)
        return result if isinstance(result, torch.Tensor) else result.logits

    return call


@pytest.fixture
def adapter_layers():
    """Adapter layers by name."""

    def find(model):
        return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)}

    return find

import gguf
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from torchdsc.lab.schema import SettingsError
from torchdsc.lab.tasks.adaptation.base import load_base, resolve_base

TENSORS = {
    **{"model.embed_tokens": "token_embd", "model.norm": "output_norm"},
    **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    **{f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"},
    **{"self_attn.o_proj": "attn_output"},
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
}


@pytest.fixture
def written(tmp_path):
    """A tiny Llama, and its file in GGUF."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=260, tie_word_embeddings=True, **sizes))
    file = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    for name, value in (
        *(("block_count", 1), ("context_length", 64), ("embedding_length", 16), ("feed_forward_length", 24)),
        *(("head_count", 2), ("head_count_kv", 2), ("layer_norm_rms_eps", 1e-6), ("vocab_size", 260)),
        *(("tokenizer_model", "gpt2"), ("tokenizer_pre", "default"), ("token_merges", ["t h", "th e", "a n"])),
        *(("token_list", [*sorted(ByteLevel.alphabet()), "<|end|>", "th", "the", "an"]), ("eos_token_id", 256)),
        *(("token_types", [1] * 256 + [3] + [1] * 3), ("bos_token_id", 256)),
    ):
        getattr(writer, f"add_{name}")(value)
    with torch.no_grad():
        # The format keeps their rows in another order.
        for name in ("q_proj", "k_proj"):
            model.model.layers[0].self_attn.get_submodule(name).weight.zero_()
    for name, tensor in model.state_dict().items():
        name = name.removesuffix(".weight").removeprefix("model.layers.0.")
        if name != "lm_head":
            block = "" if name.startswith("model.") else "blk.0."
            writer.add_tensor(f"{block}{TENSORS[name]}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model.eval(), file


def test_gguf(written, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHDSC_CACHE", str(tmp_path / "cache"))
    model, file = written
    folder = resolve_base(f"gguf:{file}")
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.arange(10)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert tokenizer("the")["input_ids"] == [258]
    # It can be saved again, and is converted once.
    loaded.save_pretrained(tmp_path / "again")
    file_time = next((tmp_path / "cache").rglob("model.safetensors")).stat().st_mtime_ns
    assert resolve_base(f"gguf:{file}") == folder
    assert next((tmp_path / "cache").rglob("model.safetensors")).stat().st_mtime_ns == file_time


def test_gguf_needs_its_package(written, monkeypatch):
    monkeypatch.setattr("torchdsc.lab.tasks.adaptation.base.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="needs the package gguf: pip install gguf"):
        resolve_base(f"gguf:{written[1]}")


def test_masked_lm_is_no_causal_one(settings, prose, tmp_path):
    """Its outputs see the answers."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(vocab_size=16, **sizes)).save_pretrained(tmp_path)
    chosen = settings(**prose)
    assert type(load_base(chosen, 1, weights=True)).__name__ == "LlamaForCausalLM"
    with pytest.raises(SettingsError, match="must be a causal LM, got a BertLMHeadModel whose outputs depend on later"):
        load_base(chosen.model_copy(update={"base": str(tmp_path)}), 1, weights=True)

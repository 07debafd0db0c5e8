import re
import shutil

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import torchdsc
from torchdsc.adapters import DSCAdapterConfig
from torchdsc.cli.main import main
from torchdsc.diagnostics import coherence, effective_rank
from torchdsc.lab.inspection import inspect, load_saved
from torchdsc.lab.inspection.report import lines, render_inspection
from torchdsc.lab.training.generation import generate
from torchdsc.models import DSCGPTConfig, DSCGPTForCausalLM

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT = "abc cab bca aab " * 40


def dscgpt(kind="dsc", **options):
    config = {"num_atoms": 40, "top_k": 4, **options} if kind == "dsc" else options
    return DSCGPTForCausalLM(
        DSCGPTConfig(**SIZES, intermediate_size=16, feed_forward=kind, feed_forward_options=config)
    )


def save_tokenizer(folder):
    words = Tokenizer(
        models.WordLevel({"[UNK]": 0, **{letter: place for place, letter in enumerate("abc ", 1)}}, "[UNK]")
    )
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)


@pytest.fixture
def folders(tmp_path):
    """A saved model of each kind, with a tokenizer."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48))
    base.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    dscgpt().save_pretrained(tmp_path / "dscgpt" / "model")
    save_tokenizer(tmp_path / "dscgpt" / "model")
    torchdsc.convert(base, num_atoms=40, top_k=4)
    base.save_pretrained(tmp_path / "converted")
    save_tokenizer(tmp_path / "converted")
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    config = DSCAdapterConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], num_atoms=24, top_k=2)
    get_peft_model(plain, config).save_pretrained(tmp_path / "adapter")
    return tmp_path


KINDS = {"dscgpt": "DSCGPT", "converted": "converted model", "adapter": "adapter"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_generates(folders, kind):
    text = generate(folders / kind, "abc", max_new_tokens=4, temperature=0.0)
    assert text.startswith("abc") or text.startswith("a b c")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_loaded_and_measured(folders, kind):
    saved = load_saved(folders / kind)
    assert saved.kind == KINDS[kind]
    found = inspect(saved, text=TEXT)
    assert found.num_tokens == len(TEXT)
    assert len(found.layers) == 3
    for state in found.layers:
        assert 0 < state.health.utilization <= 1
        assert state.health.measured_norm <= state.health.certified_norm
        assert sum(state.load) / len(state.load) == pytest.approx(1.0, rel=0.2)


def test_figures_are_of_the_saved_weights(folders):
    saved = load_saved(folders / "dscgpt")
    bank = saved.model.model.blocks[1].feed_forward.dsc.bank
    state = inspect(saved).layers[1]
    assert state.health.name == "model.blocks.1.feed_forward.dsc"
    assert state.health.effective_rank_u == pytest.approx(effective_rank(bank.u), rel=1e-4)
    assert state.health.coherence_v == pytest.approx(coherence(bank.v), rel=1e-3)
    assert state.norms["u"] == pytest.approx(sorted(bank.u.norm(dim=1).tolist(), reverse=True), rel=1e-5)
    unit = torch.nn.functional.normalize(bank.v, dim=1)
    squares = torch.linalg.svdvals(unit).square()
    assert state.spectra["v"] == pytest.approx((squares / squares.mean()).tolist(), rel=1e-3)
    assert state.load == []
    assert state.health.utilization is None


def test_sensitivity_where_routers_see_the_layers_input(folders):
    saved = load_saved(folders / "dscgpt")
    found = inspect(saved, text=TEXT)
    for state in found.layers:
        assert state.sensitivity.fixed_norm <= state.health.certified_norm
        assert state.sensitivity.local_lipschitz > 0
    assert any(line.startswith("layer") and "local Lipschitz constant" in line for line in lines(found))
    assert "local Lipschitz constant" in render_inspection(found)
    assert all(state.sensitivity is None for state in inspect(saved).layers)


def test_no_sensitivity_where_they_see_embeddings(tmp_path):
    dscgpt(router_input="embeddings").save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    found = inspect(load_saved(tmp_path), text=TEXT)
    assert all(state.sensitivity is None for state in found.layers)
    assert "local Lipschitz constant" not in render_inspection(found)


def test_a_failure_is_told_in_words_and_on_the_page(folders):
    saved = load_saved(folders / "dscgpt")
    torch.nn.init.normal_(saved.model.model.blocks[2].feed_forward.dsc.router.weight, std=90.0)
    found = inspect(saved, text=TEXT)
    assert [finding.where for finding in found.findings if finding.code == "logits-clamped"] == [
        ("model.blocks.2.feed_forward.dsc",)
    ]
    assert any(line.startswith("! logits-clamped in model.blocks.2") for line in lines(found))
    assert "<b>logits-clamped</b> in model.blocks.2.feed_forward.dsc" in render_inspection(found)


@pytest.mark.parametrize("text", [None, TEXT], ids=["no text", "text"])
def test_page_has_its_pictures(folders, text):
    page = render_inspection(inspect(load_saved(folders / "dscgpt"), text=text))
    titles = re.findall(r"<figcaption><b>([^<]*)\.</b>", page)
    assert titles[:2] == ["Spectrum of U", "Spectrum of V"]
    assert ("Load" in titles) == (text is not None)
    assert page.count("<svg") == len(titles)
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", page)


def test_an_adapter_on_a_converted_model(folders):
    base = torchdsc.load_converted(folders / "converted")
    config = DSCAdapterConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], num_atoms=24, top_k=2)
    adapted = get_peft_model(base, config).eval()
    adapted.save_pretrained(folders / "both")
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(load_saved(folders / "both").model(ids).logits, adapted(ids).logits)


@pytest.mark.parametrize("lender", ["default", "library"])
def test_an_adapter_over_the_bank_of_another(folders, lender):
    base = LlamaForCausalLM.from_pretrained(folders / "base")
    options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "num_atoms": 24, "top_k": 2, "gamma_init": 1.0}
    adapted = get_peft_model(base, DSCAdapterConfig(**options), adapter_name=lender)
    adapted.add_adapter("law", DSCAdapterConfig(**options, bank_of=lender))
    adapted.set_adapter("law")
    adapted.eval().save_pretrained(folders / "many")
    saved, ids = load_saved(folders / "many" / "law"), torch.tensor([[1, 2, 3]])
    assert torch.equal(saved.model(ids).logits, adapted(ids).logits)
    assert generate(folders / "many" / "law", "abc", max_new_tokens=2, temperature=0.0)
    shutil.copytree(folders / "many" / "law", folders / "alone" / "law")
    with pytest.raises(FileNotFoundError, match=f"uses the bank of '{lender}', which must be in"):
        load_saved(folders / "alone" / "law")


def test_a_base_without_a_number_of_positions(tmp_path):
    base = BloomForCausalLM(BloomConfig(vocab_size=5, hidden_size=16, n_layer=1, n_head=2))
    base.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    base = BloomForCausalLM.from_pretrained(tmp_path / "base")
    config = DSCAdapterConfig(task_type="CAUSAL_LM", target_modules=["query_key_value"], num_atoms=24, top_k=2)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    assert generate(tmp_path / "adapter", "abc", max_new_tokens=3, temperature=0.0).startswith(("abc", "a b c"))


def test_experts_are_routed_layers_too(tmp_path):
    dscgpt("moe", num_experts=4).save_pretrained(tmp_path)
    found = inspect(load_saved(tmp_path))
    assert [(state.health.num_atoms, state.health.top_k) for state in found.layers] == [(4, 2)] * 3
    assert "4" in lines(found)[-3]
    render_inspection(found)


def test_names_are_escaped(folders, tmp_path):
    odd = tmp_path / "<b>model"
    dscgpt().save_pretrained(odd)
    assert "<b>model" not in render_inspection(inspect(load_saved(odd)))


class TestErrors:
    def test_no_model(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no model in .*: a folder of a model has config.json"):
            load_saved(tmp_path)

    def test_a_model_of_another_kind(self, folders):
        with pytest.raises(ValueError, match=r"must hold a DSCGPT, .* got model_type 'llama'"):
            load_saved(folders / "base")

    def test_base_of_a_whole_model(self, folders):
        with pytest.raises(ValueError, match="base must be None for a whole model, got 'x'"):
            load_saved(folders / "dscgpt", base="x")

    def test_text_without_a_tokenizer(self, tmp_path):
        dscgpt().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="text needs a tokenizer, and there is none in"):
            inspect(load_saved(tmp_path), text=TEXT)

    def test_empty_text(self, folders):
        with pytest.raises(ValueError, match="text must have at least one token, got none"):
            inspect(load_saved(folders / "dscgpt"), text="")

    def test_no_routed_layer(self, tmp_path):
        dscgpt("dense").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="model must contain a routed layer"):
            inspect(load_saved(tmp_path))


def test_command(folders, capsys):
    file = folders / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    assert main(["inspect", str(folders / "dscgpt"), "--text", str(file)]) == 0
    out = capsys.readouterr().out
    assert "model.blocks.0.feed_forward.dsc" in out
    assert "No sign of failure" in out
    assert (folders / "dscgpt" / "model" / "inspection.html").is_file()
    assert main(["inspect", str(folders / "nothing")]) == 2
    assert "No such file or directory" in capsys.readouterr().err

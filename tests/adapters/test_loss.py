"""The regularisers in the loss of Hugging Face models."""

import pytest
import torch
import transformers
from torch.nn import functional

from torchdsc import regularization
from torchdsc.adapters import last_regularization
from torchdsc.losses.host import sums_loss

TARGETS = {
    "gpt2": ["c_attn", "mlp"],
    "llama": ["q_proj", "mlp"],
    "bert": ["query", "intermediate"],
    "t5": ["v", "DenseReluDense"],
    "mixtral": ["q_proj"],
    "qwen_moe": ["q_proj", "shared_expert"],
    "dscgpt": ["qkv_proj", "down"],
}
WEIGHTS = {"aux_weight": 0.5, "z_weight": 0.1, "budget_weight": 0.5, "budget": 50.0, "frame_weight": 0.05}
NONE = {"aux_weight": 0.0, "z_weight": 0.0, "budget_weight": 0.0, "frame_weight": 0.0}


@pytest.fixture(params=TARGETS)
def kind(request):
    return request.param


@pytest.fixture
def training(adapt):
    """A model in training, with adapters that do something and heavy regularisers."""

    def make(kind, **fields):
        options = {"target_modules": TARGETS[kind], "dtype": torch.float64, "moved": True, **WEIGHTS, **fields}
        model = adapt(kind, **options).train()
        if kind not in ("bert", "t5") and options["dtype"] is torch.float64:
            # transformers' loss is float32 whatever the model is.
            model.base_model.model.loss_function = precise_loss
        return model

    return make


def precise_loss(logits, labels, vocab_size=None, num_items_in_batch=None, shift_labels=None, **_):
    targets = functional.pad(labels[:, 1:], (0, 1), value=-100) if shift_labels is None else shift_labels
    total = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return total / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def task_loss(model, batch):
    """Its own loss: the adapters of a model without regularisers are the same function."""
    return model(**batch).loss


def kept(model):
    return sum(len(module.statistics_log) for module in model.modules() if hasattr(module, "statistics_log"))


class TestLoss:
    def test_is_the_task_loss_and_the_regularisers(self, kind, training, make_batch):
        model, batch = training(kind), make_batch(kind)
        expected = task_loss(training(kind, **NONE), batch)
        loss = model(**batch).loss
        if kind == "dscgpt":
            # Without labels its own regularisers wait too.
            expected = task_loss(training(kind, **NONE).eval(), batch)
        if kind == "t5":
            batch["decoder_input_ids"] = shifted(batch)
        _output = model(**{**batch, "labels": None})
        total = regularization(model).total
        assert total > 0.1
        torch.testing.assert_close(loss, expected + total, rtol=1e-6, atol=0)
        assert not kept(model)

    def test_terms_for_a_log(self, training, make_batch):
        model, batch = training("llama"), make_batch("llama")
        assert last_regularization(model) == {}
        loss = model(**batch).loss
        terms = last_regularization(model)
        weighted = sum(WEIGHTS[f"{name}_weight"] * terms[name] for name in ("aux", "budget", "frame", "z"))
        assert terms["total"] == pytest.approx(weighted)
        assert loss.item() == pytest.approx(task_loss(training("llama", **NONE), batch).item() + terms["total"])

    def test_as_a_tuple(self, training, make_batch):
        model, batch = training("llama"), make_batch("llama")
        torch.testing.assert_close(model(**batch, return_dict=False)[0], model(**batch).loss)

    def test_of_transformers_own_adapters(self, make_base, make_config, training, make_batch, moved):
        model, batch = make_base("llama", torch.float64), make_batch("llama")
        torch.manual_seed(5)
        model.add_adapter(make_config(target_modules=TARGETS["llama"], **WEIGHTS))
        model.loss_function = precise_loss
        torch.testing.assert_close(moved(model).double().train()(**batch).loss, training("llama")(**batch).loss)

    @pytest.mark.parametrize("method", ["dsc", "molora"])
    def test_in_float32(self, method, adapt, make_batch):
        weights = {"aux_weight": 0.5, "z_weight": 0.1}
        fields = {"method": method, "target_modules": ["q_proj"], "moved": True, **weights}
        model, batch = adapt("llama", **fields).train(), make_batch("llama")
        plain = adapt("llama", **{**fields, "aux_weight": 0.0, "z_weight": 0.0}).train()
        loss = model(**batch).loss
        assert last_regularization(model)["total"] > 0.1
        expected = plain(**batch).loss.item() - last_regularization(plain).get("total", 0.0)
        assert loss.item() == pytest.approx(expected + last_regularization(model)["total"], rel=1e-5)

    @pytest.mark.parametrize("told", [True, False])
    def test_padding_does_not_count(self, kind, told, training, make_batch):
        model, batch = training(kind, **{**NONE, "z_weight": 0.1}), make_batch(kind)
        if kind == "t5":
            batch["decoder_input_ids"] = shifted(batch)
            # As long as the encoder's: each token has the mask of its own side.
            batch["decoder_input_ids"] = functional.pad(batch["decoder_input_ids"], (0, 2), value=5)
            batch["labels"] = functional.pad(batch["labels"], (0, 2), value=-100)
            batch["labels"][0, 2:] = -100
            if told:
                batch["decoder_attention_mask"] = (batch["labels"] != -100).long()
            else:
                # As collators have it: the model makes the decoder's tokens of the labels.
                del batch["decoder_input_ids"]
        counts = []
        for module in model.modules():
            if hasattr(module, "statistics_log"):
                module.statistics_log.leave = lambda entry, *_, **__: counts.append(int(entry.num_tokens))
        model(**batch)
        routed, decoded = int(batch["attention_mask"].sum()), 20
        if kind != "t5":
            assert set(counts) == {routed}
        else:
            # Encoder blocks, then decoder blocks: self-attention, cross-attention over the encoder's states, MLP.
            assert counts == [routed, routed] * 2 + [decoded, routed, decoded] * 2

    def test_mask_by_position(self, training, make_batch):
        model, batch = training("llama"), make_batch("llama")
        expected = model(**batch).loss
        inner = model.base_model.model
        assert torch.equal(inner(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss, expected)
        unmasked = inner(batch["input_ids"], labels=batch["labels"]).loss
        assert not torch.allclose(unmasked, expected)

    def test_frame_alone(self, training, make_batch):
        model, batch = training("llama", **{**NONE, "frame_weight": 0.05}), make_batch("llama")
        total = regularization(model).total
        assert total > 1e-3
        torch.testing.assert_close(model(**batch).loss, task_loss(training("llama", **NONE), batch) + total)


class TestNothingIsAdded:
    @pytest.mark.parametrize("weights", [WEIGHTS, {**NONE, "frame_weight": 0.05}], ids=["all", "frame"])
    def test_in_evaluation(self, kind, weights, training, make_batch):
        model, batch = training(kind, **weights).eval(), make_batch(kind)
        assert torch.equal(model(**batch).loss, training(kind, **NONE).eval()(**batch).loss)
        assert not kept(model)

    def test_without_gradients(self, training, make_batch):
        """Neither then nor to the next loss, as where a policy is scored before its update."""
        model, batch = training("llama"), make_batch("llama")
        expected = model(**batch).loss
        with torch.no_grad():
            assert torch.equal(model(**batch).loss, training("llama", **NONE)(**batch).loss)
        assert not kept(model)
        assert torch.equal(model(**batch).loss, expected)

    def test_but_what_waits_is_not_lost_in_a_call_without_gradients(self, training, make_batch):
        model, batch = training("llama"), make_batch("llama")
        labels = batch.pop("labels")
        logits = model(**batch).logits
        with torch.no_grad():
            model(**batch, labels=labels)
        with pytest.raises(RuntimeError, match="were not collected before its backward pass"):
            logits.sum().backward()

    def test_by_what_is_off_frozen_or_absent(self, training, make_config, make_batch):
        model, batch = training("llama", modules_to_save=["lm_head"]), make_batch("llama")
        expected = training("llama", **NONE, modules_to_save=["lm_head"])(**batch).loss
        model.add_adapter("other", make_config(target_modules=["q_proj"], **WEIGHTS))
        with_default = model(**batch).loss
        assert with_default > expected + 0.1
        for name, parameter in model.named_parameters():
            if ".dsc_layers." in name:
                parameter.requires_grad_(False)
        assert torch.equal(model(**batch).loss, expected)
        assert not kept(model)
        with model.disable_adapter():
            model(**batch)
        assert not kept(model)

    def test_with_weights_of_zero(self, training, make_batch):
        model = training("llama", **NONE)
        model(**{**make_batch("llama"), "labels": None}).logits.sum().backward()
        assert not kept(model)
        assert last_regularization(model) == {}


class TestWithoutLabels:
    def test_a_count_of_items_does_not_hide_that_they_are_in_no_loss(self, kind, training, make_batch):
        batch = make_batch(kind)
        if kind == "t5":
            batch["decoder_input_ids"] = shifted(batch)
        del batch["labels"]
        with pytest.raises(RuntimeError, match="were not collected before its backward pass"):
            training(kind)(**batch, num_items_in_batch=10).logits.sum().backward()

    @pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
    def test_a_backward_pass_raises_unless_they_are_collected(self, kind, training, make_batch):
        model, batch = training(kind), make_batch(kind)
        if kind == "t5":
            batch["decoder_input_ids"] = shifted(batch)
        labels = batch.pop("labels")
        with pytest.raises(RuntimeError, match=r"its labels .* add torchdsc.regularization\(model\).total"):
            model(**batch).logits.square().mean().backward()
        model.zero_grad()
        logits = model(**batch).logits
        (logits.square().mean() + regularization(model).total).backward()
        assert any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "router" in n)
        assert torch.isfinite(model(**batch, labels=labels).loss)


class TestAnotherLoss:
    """Labels reach the model, but the loss is computed outside."""

    @pytest.mark.parametrize("kind", ["llama", "bert"])
    def test_raises_without_the_models(self, kind, training, make_batch):
        model, batch = training(kind), make_batch(kind)
        with pytest.raises(RuntimeError, match="the model's loss, which holds the regularisers, is not in the loss"):
            model(**batch).logits.square().mean().backward()
        output = model(**batch)
        (output.logits.square().mean() + output.loss).backward()
        output = model(**batch, return_dict=False)
        (output[1].square().mean() + 2 * output[0]).backward()

    @pytest.mark.parametrize("labelled", [True, False])
    def test_raises_through_hidden_states(self, labelled, training, make_batch):
        model, batch = training("llama"), make_batch("llama")
        if not labelled:
            del batch["labels"]
        with pytest.raises(RuntimeError, match=r"is not in the loss|were not collected"):
            model(**batch, output_hidden_states=True).hidden_states[-1].square().mean().backward()

    def test_is_fine_without_regularisers(self, training, make_batch):
        training("llama", **NONE)(**make_batch("llama")).logits.square().mean().backward()


class TestItemsInBatch:
    @pytest.mark.parametrize("kind", ["gpt2", "llama", "mixtral", "qwen_moe"])
    def test_sums_over_tokens_are_divided_by_it(self, kind, training, make_batch):
        linear = {**NONE, "z_weight": 0.1}
        model, batch = training(kind, **linear), make_batch(kind)
        plain = training(kind, **NONE)
        for items in (10, torch.tensor(20)):
            own = model(**batch, num_items_in_batch=items).loss - plain(**batch, num_items_in_batch=items).loss
            mean = model(**batch).loss - plain(**batch).loss
            torch.testing.assert_close(own, mean * int(batch["attention_mask"].sum()) / items, rtol=1e-5, atol=0)

    def test_shares_of_the_frame_are_those_of_labels(self, training, make_batch):
        model, batch = training("llama", **{**NONE, "frame_weight": 0.05}), make_batch("llama")
        plain, total = training("llama", **NONE), regularization(model).total
        labelled = int((batch["labels"][:, 1:] != -100).sum())
        batch = {**batch, "num_items_in_batch": 2 * labelled}
        torch.testing.assert_close(model(**batch).loss - plain(**batch).loss, total / 2, rtol=1e-5, atol=0)
        ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
        positional = model.base_model.model(ids, mask, None, None, None, labels, num_items_in_batch=2 * labelled).loss
        torch.testing.assert_close(positional, model(**batch).loss)
        given = functional.pad(labels[:, 1:], (0, 1), value=-100)
        batch = {**batch, "shift_labels": given, "labels": torch.zeros_like(labels)}
        torch.testing.assert_close(model(**batch).loss - plain(**batch).loss, total / 2, rtol=1e-5, atol=0)

    def test_a_model_whose_labels_trainer_does_not_shift(self, training, make_batch):
        """GPT-2 has no name for its loss: the step's labels are counted as they are."""
        model, batch = training("gpt2", **{**NONE, "frame_weight": 0.05}), make_batch("gpt2")
        plain, total = training("gpt2", **NONE), regularization(model).total
        batch["num_items_in_batch"] = int((batch["labels"] != -100).sum())
        torch.testing.assert_close(model(**batch).loss - plain(**batch).loss, total, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("kind", ["bert", "t5"])
    def test_does_nothing_where_the_task_loss_is_a_mean(self, kind, training, make_batch):
        model, batch = training(kind), make_batch(kind)
        assert model.base_model.model.accepts_loss_kwargs is False
        torch.testing.assert_close(model(**batch, num_items_in_batch=100).loss, model(**batch).loss)


def shifted(batch):
    return functional.pad(batch["labels"][:, :-1], (1, 0), value=0)


DECODER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
LLAMA = {**DECODER, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
BERT = {**DECODER, "embedding_size": 16, "pad_token_id": 0}
T5 = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CLASSES = {
    "LlamaForCausalLM": LLAMA,
    "LlamaForSequenceClassification": LLAMA,
    "LlamaForTokenClassification": LLAMA,
    "Qwen2ForCausalLM": LLAMA,
    "GemmaForCausalLM": LLAMA,
    "MixtralForCausalLM": {**LLAMA, "num_local_experts": 2},
    "GPTNeoXForCausalLM": DECODER,
    "GPT2LMHeadModel": GPT2,
    "GPT2ForSequenceClassification": GPT2,
    "BertLMHeadModel": {**BERT, "is_decoder": True},
    "BertForMaskedLM": BERT,
    "BertForSequenceClassification": BERT,
    "BertForTokenClassification": BERT,
    "RobertaForMaskedLM": BERT,
    "ModernBertForMaskedLM": {**DECODER, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2},
    "DistilBertForMaskedLM": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16},
    "T5ForConditionalGeneration": T5,
}


@pytest.mark.parametrize("name", CLASSES)
def test_knows_what_a_model_does_with_the_count(name):
    cls = getattr(transformers, name)
    config = cls.config_class(vocab_size=32, **{"bos_token_id": 1, "eos_token_id": 2, **CLASSES[name]})
    model = cls(config).eval()
    input_ids = torch.randint(3, 32, (2, 6))
    labels = input_ids
    if "Classification" in name:
        labels = torch.randint(0, 2, (2,) if "Sequence" in name else (2, 6))
    items = 2 * int(labels[..., 1:].numel() if "Causal" in name or "LMHead" in name else labels.numel())
    with torch.no_grad():
        mean = model(input_ids=input_ids, labels=labels).loss
        try:
            counted = model(input_ids=input_ids, labels=labels, num_items_in_batch=items).loss
        except TypeError:
            counted = mean
    ratio = (counted / mean).item()
    assert ratio == pytest.approx(0.5 if sums_loss(model) else 1.0)

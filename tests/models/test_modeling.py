import copy

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from torchdsc.models import DSCGPTConfig, DSCGPTForCausalLM, DSCGPTModel

# Float32 logits of order 1 to 10, computed in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


class TestAttentionUpdate:
    def test_composes_from_the_banks_of_the_blocks(self, make_model, input_ids):
        model = make_model("dsc, attention")
        for copied in (model, copy.deepcopy(model)):
            for block in copied.model.blocks:
                assert block.attention.update.bank is block.feed_forward.dsc.bank
        names = [name for name, _ in model.named_parameters() if "bank.u" in name]
        assert len(names) == 2
        # The banks and routers of attention alone decide here.
        for block in model.model.blocks:
            block.feed_forward.dsc.gamma.data.zero_()
        before = model(input_ids).logits
        model.model.blocks[0].attention.update.gamma.data.mul_(-20)
        assert not torch.allclose(model(input_ids).logits, before, atol=1e-2)

    def test_one_bank_serves_all(self, make_model):
        model = make_model("dsc, attention and one bank")
        first = model.model.blocks[0].feed_forward.dsc.bank
        assert all(block.attention.update.bank is block.feed_forward.dsc.bank is first for block in model.model.blocks)
        assert sum("bank.u" in name for name, _ in model.named_parameters()) == 1

    def test_a_copy_of_one_layer_trains_and_saves_a_bank_of_its_own(self, make_model):
        model = make_model("dsc, one bank")
        layer = model.model.blocks[1].feed_forward.dsc
        copied = copy.deepcopy(layer)
        assert copied.bank is not layer.bank
        assert {name for name, _ in copied.named_parameters()} >= {"bank.u", "bank.v"}
        assert torch.equal(copied.state_dict()["bank.u"], layer.bank.u)

    def test_is_the_dsc_layer_of_what_attention_gives_out(self, make_model, input_ids):
        attention = make_model("dsc, attention").model.blocks[0].attention
        x, seen = torch.randn(2, 5, 16), []
        attention.out_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        y = attention(x, None, None, None)[0]
        torch.testing.assert_close(y, attention.out_proj(seen[0]) + attention.update(seen[0]))

    @pytest.mark.parametrize("options", [{"offset": True}, {"atom_features": 5}, {"offset": True, "atom_features": 5}])
    def test_of_thin_atoms_and_offsets(self, options, make_model, input_ids):
        model = make_model("dsc, attention", feed_forward_options=options).train()
        update = model.model.blocks[0].attention.update
        assert (update.in_features, update.out_features) == (16, 16)
        assert update.bank is model.model.blocks[0].feed_forward.dsc.bank
        model(input_ids, labels=input_ids).loss.backward()
        assert all(parameter.grad is not None for parameter in update.parameters())


class TestContexts:
    @pytest.fixture
    def inputs_of(self):
        def collect(model, modules, input_ids):
            seen = []
            for module in modules:
                module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
            model(input_ids)
            return seen

        return collect

    @pytest.fixture
    def embeddings(self, input_ids):
        def of(model):
            return functional.layer_norm(model.model.embed_tokens(input_ids), (16,), eps=0.1)

        return of

    @pytest.mark.parametrize("kind", ["dsc, embeddings", "moe, embeddings"])
    def test_routers_of_all_blocks_see_embeddings(self, kind, make_model, input_ids, inputs_of, embeddings):
        model = make_model(kind, layer_norm_eps=0.1)
        blocks = model.model.blocks
        routers = [block.routed_layer.router for block in blocks]
        seen = inputs_of(model, routers if kind.startswith("dsc") else [r.linear for r in routers], input_ids)
        assert len(seen) == 2
        for block, mixed in zip(blocks, seen, strict=True):
            torch.testing.assert_close(mixed, block.router_context(embeddings(model)).reshape(-1, 16))

    def test_a_routers_own_embedding_alone(self, make_model, input_ids, inputs_of, embeddings):
        model = make_model("mixture_of_loras, own embedding", layer_norm_eps=0.1)
        seen = inputs_of(model, [block.routed_layer.router.linear for block in model.model.blocks], input_ids)
        assert len(seen) == 2
        assert all(torch.equal(x, embeddings(model).reshape(-1, 16)) for x in seen)

    @pytest.mark.parametrize(("kind", "part"), [("dense, embeddings", "up"), ("moe, embeddings", "experts")])
    def test_layers_see_embeddings_beside_the_hidden_state(
        self, kind, part, make_model, input_ids, inputs_of, embeddings
    ):
        model, normed = make_model(kind, layer_norm_eps=0.1), []
        blocks = model.model.blocks
        for block in blocks:
            block.feed_forward_norm.register_forward_hook(lambda module, args, output: normed.append(output))
        seen = inputs_of(model, [getattr(block.feed_forward, part) for block in blocks], input_ids)
        for block, before, x in zip(blocks, normed, seen, strict=True):
            torch.testing.assert_close(x.reshape(before.shape), before + block.input_context(embeddings(model)))


@pytest.mark.parametrize(("static", "width", "sees"), [("gated", 8, True), ("gated", 0, False), ("dense", 8, False)])
def test_beside_ngrams_nothing_is_built_that_no_layer_sees(static, width, sees, make_model, input_ids):
    options = {"router_context": 5, "static": static}
    model = make_model("dsc, n-grams", feed_forward_options=options, intermediate_size=width).train()
    assert all((block.router_context is not None) == sees for block in model.model.blocks)
    assert model.config.model_options.past_tokens == model.model.model_options.past_tokens == (4 if sees else 2)
    model(input_ids, labels=input_ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class TestFiles:
    def test_round_trip_through_the_auto_classes(self, kind, make_model, input_ids, tmp_path):
        model = make_model(kind)
        model.save_pretrained(tmp_path)
        assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
        config = AutoConfig.from_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(config) is DSCGPTConfig
        assert config.feed_forward_options == model.config.feed_forward_options
        assert type(loaded) is DSCGPTForCausalLM
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)

    def test_untied_embeddings(self, make_model, input_ids, tmp_path):
        model = make_model("dsc", tie_word_embeddings=False)
        assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
        model.save_pretrained(tmp_path)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids).logits, model(input_ids).logits)

    def test_backbone_alone(self, make_model, input_ids, tmp_path):
        model = make_model("dsc")
        model.save_pretrained(tmp_path)
        backbone = AutoModel.from_pretrained(tmp_path)
        assert type(backbone) is DSCGPTModel
        assert torch.equal(backbone(input_ids).last_hidden_state, model.model(input_ids).last_hidden_state)

    @pytest.mark.parametrize("auto", [DSCGPTForCausalLM, DSCGPTModel, AutoModelForCausalLM, AutoModel])
    def test_pickled_weights(self, auto, make_model, tmp_path):
        model = make_model("dsc")
        model.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            auto.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match="use_safetensors must be None or True, got False: pickled"):
            auto.from_pretrained(tmp_path, use_safetensors=False)

    def test_in_half_precision(self, kind, make_model, input_ids, tmp_path):
        model = make_model(kind)
        model.save_pretrained(tmp_path)
        low = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
        assert (low(input_ids).logits - model(input_ids).logits).abs().mean() < 0.1


class TestGeneration:
    def test_cached_logits_equal_the_full_ones_step_by_step(self, kind, make_model, input_ids):
        model, cache, steps = make_model(kind), None, []
        for t in range(input_ids.shape[1]):
            output = model(input_ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
        torch.testing.assert_close(torch.cat(steps, 1), model(input_ids).logits, **CLOSE)

    def test_greedy_tokens_are_those_without_a_cache(self, kind, make_model, input_ids):
        model, actual = make_model(kind), input_ids
        for _ in range(6):
            actual = torch.cat([actual, model(actual).logits[:, -1:].argmax(-1)], 1)
        generated = model.generate(input_ids, max_new_tokens=6, do_sample=False)
        assert torch.equal(generated, actual)
        for options in ({"use_cache": False}, {"cache_implementation": "static"}):
            assert torch.equal(model.generate(input_ids, max_new_tokens=6, do_sample=False, **options), generated)

    @pytest.mark.parametrize("use_cache", [True, False])
    def test_left_padding_changes_no_token(self, kind, use_cache, make_model, input_ids):
        model, lengths = make_model(kind), (12, 5, 9)
        options = {"max_new_tokens": 8, "do_sample": False, "use_cache": use_cache}
        alone = [model.generate(row[None, -n:], **options)[0, n:] for row, n in zip(input_ids, lengths, strict=True)]
        mask = torch.arange(12) >= 12 - torch.tensor(lengths).unsqueeze(1)
        together = model.generate(input_ids * mask, attention_mask=mask.long(), **options)[:, 12:]
        assert torch.equal(together, torch.stack(alone))

    def test_from_embeddings(self, make_model, input_ids):
        model = make_model("dsc")
        embeds = model.get_input_embeddings()(input_ids)
        generated = model.generate(inputs_embeds=embeds, max_new_tokens=4, do_sample=False)
        assert torch.equal(generated, model.generate(input_ids, max_new_tokens=4, do_sample=False)[:, 12:])

    def test_logits_to_keep(self, make_model, input_ids):
        model = make_model("dsc")
        torch.testing.assert_close(model(input_ids, logits_to_keep=2).logits, model(input_ids).logits[:, -2:], **CLOSE)
        kept = torch.tensor([1, 7])
        torch.testing.assert_close(
            model(input_ids, logits_to_keep=kept).logits, model(input_ids).logits[:, kept], **CLOSE
        )


class TestForward:
    def test_is_causal(self, kind, make_model, input_ids):
        model, changed = make_model(kind), input_ids.clone()
        changed[:, 8] = (changed[:, 8] + 1) % 61
        before, after = model(input_ids).logits, model(changed).logits
        torch.testing.assert_close(after[:, :8], before[:, :8], **CLOSE)
        assert ((after - before)[:, 8:].abs().amax((0, 2)) > 1e-2).all()

    @pytest.mark.parametrize("padded", [False, True])
    def test_sdpa_equals_eager_attention(self, kind, padded, make_model, input_ids):
        model = make_model(kind)
        assert model.config._attn_implementation == "sdpa"
        mask = torch.ones_like(input_ids)
        mask[0, 9:] = 1 - padded
        arguments = {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids}
        losses, gradients = [], []
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            assert model.config._attn_implementation == implementation
            losses.append(model(**arguments).loss)
            gradients.append(torch.autograd.grad(losses[-1], model.model.embed_tokens.weight)[0])
        torch.testing.assert_close(*losses, **CLOSE)
        torch.testing.assert_close(*gradients, **CLOSE)

    def test_position_ids_place_left_padded_tokens(self, make_model, input_ids):
        model, mask = make_model("dsc"), torch.ones_like(input_ids)
        mask[:, :4] = 0
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        padded = model(input_ids, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(padded[:, 4:], model(input_ids[:, 4:]).logits, **CLOSE)

    def test_without_a_static_layer(self, make_model, input_ids):
        model = make_model("dsc", intermediate_size=0)
        model(input_ids, labels=input_ids).loss.backward()
        assert not any("base" in name for name, _ in model.named_parameters())

    def test_return_dict_false_gives_a_tuple(self, make_model, input_ids):
        model = make_model("dsc")
        output = model(input_ids, labels=input_ids, use_cache=False, return_dict=False)
        assert type(output) is tuple
        assert output[0].shape == ()
        assert torch.equal(output[1], model(input_ids).logits)
        backbone = model.model(input_ids, return_dict=False)
        assert type(backbone) is tuple
        assert torch.equal(backbone[0], model.model(input_ids).last_hidden_state)

    def test_resized_embeddings_stay_tied(self, make_model, input_ids):
        model = make_model("dsc")
        before = model(input_ids).logits
        model.resize_token_embeddings(70)
        after = model(input_ids).logits
        assert after.shape[-1] == 70
        assert model.lm_head.weight is model.model.embed_tokens.weight
        torch.testing.assert_close(after[..., :61], before)


class TestErrors:
    def test_sequence_longer_than_the_positions(self, make_model, input_ids):
        model = make_model("dsc", max_position_embeddings=11)
        with pytest.raises(ValueError, match=r"at most max_position_embeddings = 11 tokens, got 12"):
            model(input_ids)
        cache = model(input_ids[:, :11], use_cache=True).past_key_values
        with pytest.raises(ValueError, match=r"at most max_position_embeddings = 11 tokens, got 12"):
            model(input_ids[:, 11:], past_key_values=cache)

    @pytest.mark.parametrize("both", [True, False])
    def test_needs_one_of_tokens_and_embeddings(self, both, make_model, input_ids):
        model = make_model("dsc")
        arguments = {"input_ids": input_ids, "inputs_embeds": torch.zeros(3, 12, 16)} if both else {}
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds must be given"):
            model(**arguments)

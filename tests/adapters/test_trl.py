"""Supervised fine-tuning by TRL."""

import copy

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

import datasets
import transformers
import trl
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from torchdsc import RegularizedLoss, convert
from torchdsc.models import DSCGPTConfig, DSCGPTForCausalLM


@pytest.fixture
def tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 64)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


SETTINGS = {
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


class RegularizedSFTTrainer(RegularizedLoss, trl.SFTTrainer):
    """TRL computes its loss outside the model."""


@pytest.fixture
def make_trainer(tokenizer, make_base, make_config, tmp_path):
    def make(cls=RegularizedSFTTrainer, accumulation=1, **fields):
        texts = [" ".join(f"w{3 + (start + step) % 61}" for step in range(6 + start % 3)) for start in range(16)]
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path / "trainer"),
            max_steps=10,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            learning_rate=3e-2,
            **SETTINGS,
        )
        return cls(
            make_base("llama"),
            args=arguments,
            train_dataset=datasets.Dataset.from_dict({"text": texts}),
            processing_class=tokenizer,
            peft_config=make_config(target_modules=["q_proj", "mlp"], task_type="CAUSAL_LM", **fields),
        )

    return make


NONE = dict.fromkeys(("aux_weight", "budget_weight", "frame_weight", "z_weight"), 0.0)


@pytest.mark.parametrize(
    ("cls", "accumulation", "fields"),
    [(RegularizedSFTTrainer, 1, {}), (RegularizedSFTTrainer, 2, {}), (trl.SFTTrainer, 1, NONE)],
    ids=["regularised", "in two micro-batches", "without regularisers"],
)
def test_sft_learns_and_the_adapter_loads(
    cls, accumulation, fields, make_trainer, make_base, make_batch, output, tmp_path
):
    trainer = make_trainer(cls, accumulation, **fields)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    trainer.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_base("llama"), tmp_path / "adapter")
    batch = make_batch("llama")
    assert torch.equal(output(loaded, batch), output(trainer.model.eval(), batch))
    assert not torch.equal(output(loaded, batch), output(make_base("llama"), batch))


def test_sft_raises_where_the_regularisers_would_vanish(make_trainer):
    with pytest.raises(RuntimeError, match="were not collected before its backward pass"):
        make_trainer(trl.SFTTrainer).train()


FEED_FORWARD = {
    "dsc": {"num_atoms": 16, "top_k": 4, "budget": 5.0},
    "moe": {"num_experts": 4, "top_k": 2},
    "mixture_of_loras": {"num_experts": 4, "rank": 1},
}


def dscgpt(kind, aux_weight):
    torch.manual_seed(0)
    options = {**FEED_FORWARD[kind], "aux_weight": aux_weight}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
    tokens = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = DSCGPTConfig(
        feed_forward=kind, intermediate_size=8, feed_forward_options=options, dropout=0.0, **sizes, **tokens
    )
    return DSCGPTForCausalLM(config)


def converted(_, aux_weight):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.LlamaConfig(vocab_size=64, pad_token_id=0, **sizes)
    model = transformers.LlamaForCausalLM(config)
    convert(model, num_atoms=16, top_k=4, aux_weight=aux_weight)
    return model


@pytest.fixture
def make_trained(tokenizer, tmp_path):
    """Train a model for three steps by a trainer of TRL; return its losses."""

    def make(trainer, config, model, dataset, **options):
        beside = {name: options.pop(name) for name in ("reward_funcs",) if name in options}
        if issubclass(trainer, trl.DPOTrainer):
            beside["ref_model"] = copy.deepcopy(model)
        arguments = config(
            output_dir=str(tmp_path / "trainer"),
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            **SETTINGS,
            **options,
        )
        examples = datasets.Dataset.from_dict(dataset)
        trained = trainer(model, args=arguments, train_dataset=examples, processing_class=tokenizer, **beside)
        trained.train()
        return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]

    return make


SENTENCES = [" ".join(f"w{3 + (start + step) % 61}" for step in range(6)) for start in range(12)]
PREFERENCES = {"prompt": SENTENCES, "chosen": SENTENCES[::-1], "rejected": SENTENCES[3:] + SENTENCES[:3]}


class RegularizedDPOTrainer(RegularizedLoss, trl.DPOTrainer):
    pass


@pytest.mark.parametrize(
    ("make", "kind"), [(dscgpt, "dsc"), (dscgpt, "moe"), (dscgpt, "mixture_of_loras"), (converted, "llama")]
)
class TestModelsThatRoute:
    """TRL applies the head itself: what a model adds to its own loss would vanish."""

    def test_sft(self, make, kind, make_trained):
        arguments = (trl.SFTConfig,), {"text": SENTENCES}
        losses = [
            make_trained(RegularizedSFTTrainer, *arguments[0], make(kind, weight), arguments[1]) for weight in (0, 100)
        ]
        assert losses[1][0] > losses[0][0] + 50
        with pytest.raises(RuntimeError, match=r"put torchdsc.RegularizedLoss before the class of a trainer"):
            make_trained(trl.SFTTrainer, trl.SFTConfig, make(kind, 100), {"text": SENTENCES})

    def test_dpo(self, make, kind, make_trained):
        losses = [
            make_trained(RegularizedDPOTrainer, trl.DPOConfig, make(kind, weight), PREFERENCES) for weight in (0, 100)
        ]
        assert losses[1][0] > losses[0][0] + 50
        with pytest.raises(RuntimeError, match=r"put torchdsc.RegularizedLoss before the class of a trainer"):
            make_trained(trl.DPOTrainer, trl.DPOConfig, make(kind, 100), PREFERENCES)


class RegularizedGRPOTrainer(RegularizedLoss, trl.GRPOTrainer):
    pass


def test_grpo(make_trained):
    options = {
        "num_generations": 2,
        "max_completion_length": 4,
        "reward_funcs": lambda completions, **_: [0.0, 1.0] * 2,
    }
    losses = [
        make_trained(RegularizedGRPOTrainer, trl.GRPOConfig, dscgpt("dsc", weight), {"prompt": SENTENCES}, **options)
        for weight in (0, 100)
    ]
    assert losses[1][0] > losses[0][0] + 50
    with pytest.raises(RuntimeError, match=r"put torchdsc.RegularizedLoss before the class of a trainer"):
        make_trained(trl.GRPOTrainer, trl.GRPOConfig, dscgpt("dsc", 100), {"prompt": SENTENCES}, **options)

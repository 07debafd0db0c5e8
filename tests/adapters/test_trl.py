"""Supervised fine-tuning by TRL."""

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

import datasets
import trl
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from torchdsc.adapters import RegularizedLoss


@pytest.fixture
def tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 64)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


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
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
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
    with pytest.raises(RuntimeError, match="its loss is not the one in use"):
        make_trainer(trl.SFTTrainer).train()

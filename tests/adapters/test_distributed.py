"""Trainer in two processes, with unequal padding, takes the step of one process."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

pytest.importorskip("accelerate")

from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from torchdsc.adapters import DSCAdapterConfig

LENGTHS = (9, 4, 7, 2)


def precise_loss(logits, labels, vocab_size=None, num_items_in_batch=None, **_):
    total = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return total / num_items_in_batch


def make_model():
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, initializer_range=0.2, **sizes)).double()
    # Terms that are linear in tokens, or independent of them.
    weights = {"aux_weight": 0.0, "budget_weight": 0.0, "z_weight": 0.1, "frame_weight": 0.05}
    config = DSCAdapterConfig(target_modules=["q_proj", "mlp"], num_atoms=8, top_k=2, gamma_init=0.1, **weights)
    model = get_peft_model(base, config).double()
    model.base_model.model.loss_function = precise_loss
    return model


def make_examples():
    generator, examples = torch.Generator().manual_seed(4), []
    for length in LENGTHS:
        ids, mask = torch.randint(1, 32, (max(LENGTHS),), generator=generator), torch.arange(max(LENGTHS)) < length
        examples.append(
            {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": torch.where(mask, ids, -100)}
        )
    return examples


def step(folder, batch_size):
    model = make_model()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        max_steps=1,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model, arguments, train_dataset=make_examples()).train()
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=200) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    actual = torch.load(tmp_path / "weights.pt", weights_only=True)
    expected, start = step(tmp_path / "one", 4), dict(make_model().named_parameters())
    for name, value in expected.items():
        assert not torch.equal(value, start[name])
        torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-13)


if __name__ == "__main__":
    weights = step(f"{sys.argv[1]}/two", 2)
    if os.environ["RANK"] == "0":
        torch.save(weights, f"{sys.argv[1]}/weights.pt")
    torch.distributed.destroy_process_group()
    # Torch may abort on leaving the interpreter while a thread of the group is still ending.
    os._exit(0)

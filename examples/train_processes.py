"""transformers' Trainer in one process or several: DSCGPT, a converted model, or an adapted one learns this file.

    python examples/train_processes.py runs/one --model converted
    torchrun --nproc_per_node 4 examples/train_processes.py runs/four --model converted
    torchrun --nproc_per_node 2 examples/train_processes.py runs/two --model converted --resume runs/four

A step has as many examples however many processes share it, and its loss, with the regularisers, is the same. What one
number of processes has saved, another goes on from. `losses.json` in the folder has the loss of each step.
"""

import argparse
import gc
import json
import os
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from torchdsc import convert, synchronize_regularization
from torchdsc.adapters import DSCAdapterConfig
from torchdsc.models import DSCGPTConfig, DSCGPTForCausalLM

BEGIN, PADDING, VOCABULARY, LONGEST = 256, 257, 258, 96
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
OPTIONS = {
    "num_atoms": 32,
    "top_k": 4,
    **dict.fromkeys(("aux_weight", "budget_weight", "z_weight", "frame_weight"), 0.01),
}


def build_model(kind):
    torch.manual_seed(0)
    if kind == "dscgpt":
        config = DSCGPTConfig(intermediate_size=24, dropout=0.0, feed_forward_options=OPTIONS, **SIZES)
        return DSCGPTForCausalLM(config)
    model = LlamaForCausalLM(LlamaConfig(intermediate_size=64, **SIZES))
    if kind == "converted":
        convert(model, mode="replace", hidden_features=24, **OPTIONS)
        return model
    return get_peft_model(model, DSCAdapterConfig(target_modules=["self_attn", "mlp"], gamma_init=0.1, **OPTIONS))


def examples():
    """The lines of this file as bytes; an empty one has nothing to predict."""
    lines = Path(__file__).read_bytes().splitlines()
    return [{"input_ids": [BEGIN, *line[: LONGEST - 1]]} for line in lines]


def collate(batch):
    longest = max(len(example["input_ids"]) for example in batch)
    ids = [example["input_ids"] + [PADDING] * (longest - len(example["input_ids"])) for example in batch]
    input_ids = torch.tensor(ids)
    mask = input_ids != PADDING
    return {"input_ids": input_ids, "attention_mask": mask.long(), "labels": input_ids.where(mask, -100)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where checkpoints and losses.json go")
    parser.add_argument("--model", choices=("dscgpt", "converted", "adapted"), default="dscgpt")
    parser.add_argument("--batch", type=int, default=8, help="examples of a step, over all processes")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--resume", help="folder of a run to go on from, at its last checkpoint")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    args = parser.parse_args(argv)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if args.batch % processes:
        parser.error(f"--batch must be a multiple of the number of processes, {processes}, got {args.batch}")
    arguments = TrainingArguments(
        args.folder,
        per_device_train_batch_size=args.batch // processes,
        max_steps=args.steps,
        save_steps=max(1, args.steps // 2),
        learning_rate=3e-3,
        logging_steps=1,
        logging_nan_inf_filter=False,
        # Where an epoch's last batch cannot be shared equally, accelerate fills it with examples from its beginning.
        dataloader_drop_last=True,
        bf16=args.bf16,
        gradient_checkpointing=args.checkpointing,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    model = build_model(args.model)
    synchronize_regularization(model)
    trainer = Trainer(model, arguments, train_dataset=examples(), data_collator=collate)
    last = None
    if args.resume:
        if not list(Path(args.resume).glob("checkpoint-*")):
            parser.error(f"--resume must be a folder with checkpoints, got {args.resume!r}")
        last = str(max(Path(args.resume).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])))
    trainer.train(resume_from_checkpoint=last)
    if trainer.is_world_process_zero():
        losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
        Path(args.folder, "losses.json").write_text(json.dumps(losses, indent=1) + "\n", encoding="utf-8")
    if torch.distributed.is_initialized():
        # In this order: where a model outlives its group of processes, gloo may hang or abort.
        trainer.accelerator.free_memory()
        del trainer
        gc.collect()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

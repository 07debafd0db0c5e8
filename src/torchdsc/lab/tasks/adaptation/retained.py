"""What a model still knows of its old domains: its loss on their texts, and questions with a choice of answers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchdsc.lab.training.trainer import LabTrainer

__all__ = ["Known", "OldDomains", "make_questions", "retained"]

NUM_CHOICES = 4
_ANSWER = 8

Blocks = list[dict[str, Any]]
Known = dict[str, dict[str, float]]
"""By the source of a text, its "loss" in nats per token, and "choice", the share of right answers in percent."""


@dataclass(frozen=True)
class OldDomains:
    """Texts of old domains, by their source.

    Attributes:
        blocks: To measure the loss on.
        questions: Of shape (n, choices, tokens), int64, the right answer first; n may be 0.
        rest: Other blocks of each, to train on.
    """

    blocks: Mapping[str, Blocks]
    questions: Mapping[str, Tensor]
    rest: Mapping[str, Blocks]
    _before: dict[str, Known] = field(default_factory=dict, repr=False)

    def before(self, trainer: LabTrainer, key: str, load: Callable[[], nn.Module]) -> Known:
        """What the base model knows, measured once for all runs of the same ``key``.

        Args:
            trainer: For its device, batch size and precision.
            key: Of what the answer depends on.
            load: Loads the base model. Not that of the trainer, as some adapters change it.
        """
        if key not in self._before:
            # Loading draws random numbers, which a run must not depend on.
            with torch.random.fork_rng():
                base = load().to(trainer.args.device)
            self._before[key] = self._measure(trainer, base, self.questions)
        return self._before[key]

    def after(self, trainer: LabTrainer, *, losses_alone: bool = False) -> Known:
        """What the trainer's model knows now; ``losses_alone`` leaves the questions out."""
        return self._measure(trainer, trainer.model, {} if losses_alone else self.questions)

    @property
    def num_evaluated(self) -> int:
        """Blocks of a measurement, a question counted as one."""
        return sum(len(blocks) for blocks in self.blocks.values()) + sum(
            len(asked) for asked in self.questions.values()
        )

    @torch.no_grad()
    def _measure(self, trainer: LabTrainer, model: nn.Module, asked: Mapping[str, Tensor]) -> Known:
        model.eval()
        known = {}
        for source, blocks in self.blocks.items():
            ids = torch.stack([block["input_ids"] for block in blocks])
            # All blocks are of one length.
            losses = [
                float(_call(trainer, model, some, labels=some.to(trainer.args.device)).loss) * len(some)
                for some in ids.split(trainer.args.per_device_eval_batch_size)
            ]
            known[source] = {"loss": sum(losses) / len(ids)}
        for source, questions in asked.items():
            if len(questions):
                known[source]["choice"] = 100 * _share_right(trainer, model, questions)
        return known


def _call(trainer: LabTrainer, model: nn.Module, ids: Tensor, **options: Any) -> Any:
    ids = ids.to(trainer.args.device)
    with trainer.compute_loss_context_manager():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **options)


def make_questions(blocks: Blocks, count: int) -> Tensor:
    """Questions from blocks of a text: which of four continuations of eight tokens follows the beginning of a block?

    The wrong ones are those of three other blocks.

    Args:
        blocks: With "input_ids" of shape (length,).
        count: Questions at most.

    Returns:
        Shape (n, choices, tokens), int64, the right answer first; a quarter of the block is asked about.

    Raises:
        ValueError: If there are too few blocks, or they are too short.
    """
    ids = torch.stack([block["input_ids"] for block in blocks])
    asked = ids.shape[1] // 4
    if len(ids) < NUM_CHOICES or asked + _ANSWER > ids.shape[1]:
        raise ValueError(
            f"choices must be left out where a text has less than {NUM_CHOICES} blocks, or a block has less than "
            f"{_ANSWER * 4 // 3 + 1} tokens, got {len(ids)} of {ids.shape[1]}"
        )
    # Far apart, as blocks beside each other may go on with the same sentence.
    step = max(1, len(ids) // NUM_CHOICES)
    others = [(torch.arange(len(ids)) + turn * step) % len(ids) for turn in range(NUM_CHOICES)]
    answers = torch.stack([ids[other, asked : asked + _ANSWER] for other in others], dim=1)
    prompts = ids[:, None, :asked].expand(-1, NUM_CHOICES, -1)
    return torch.cat([prompts, answers], dim=-1)[:count]


def _share_right(trainer: LabTrainer, model: nn.Module, questions: Tensor) -> float:
    """The share of questions whose right answer is more likely than all others."""
    right = []
    for some in questions.split(max(1, trainer.args.per_device_eval_batch_size // NUM_CHOICES)):
        ids = some.flatten(0, 1).to(trainer.args.device)
        logits = _call(trainer, model, ids).logits
        scores = functional.log_softmax(logits[:, -_ANSWER - 1 : -1].float(), dim=-1)
        likelihood = scores.gather(-1, ids[:, -_ANSWER:, None]).sum((1, 2)).view(-1, NUM_CHOICES)
        right.append(likelihood[:, 0] > likelihood[:, 1:].amax(1))
    return float(torch.cat(right).float().mean())


def retained(before: Known, after: Known) -> dict[str, Any]:
    """What a record says of the old domains: each, and the means over them before and after.

    Returns:
        "retained", by source "loss_before", "loss_after" and where there are questions "choice_before" and
        "choice_after"; "retain_loss_before" and "retain_loss_after", "forgotten", the difference of these, in nats per
        token, and where there are questions "choice_before" and "choice_after", in percent.
    """
    both = {"before": before, "after": after}
    every = {
        source: {f"{key}_{when}": known[source][key] for key in now for when, known in both.items()}
        for source, now in after.items()
    }

    def mean(key: str) -> float:
        return fmean(one[key] for one in every.values())

    means = {f"retain_{key}": mean(key) for key in ("loss_before", "loss_after")}
    means["forgotten"] = means["retain_loss_after"] - means["retain_loss_before"]
    if all("choice" in now for now in after.values()):
        means |= {key: mean(key) for key in ("choice_before", "choice_after")}
    return {"retained": every, **means}

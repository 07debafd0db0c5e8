"""Classification in the words of a causal LM: a prompt of each example, and the answer, one token, that follows it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.data.data_collator import DataCollatorForSeq2Seq

__all__ = ["Answers", "collate_prompts", "encode_prompt"]

# What has no loss, as transformers has it.
_IGNORED = -100


@dataclass(frozen=True)
class Answers:
    """Tokens that answer a prompt, one for each class.

    Attributes:
        tokens: Their ids, by class.
    """

    tokens: tuple[int, ...]

    @classmethod
    def of(cls, answers: Mapping[str, str], labels: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> "Answers":
        """The answers to labels.

        Args:
            answers: By label.
            labels: Names of the classes.
            tokenizer: Of the model.

        Raises:
            ValueError: If a label has no answer, or an answer is not one token, or two are the same one.
        """
        if set(answers) != set(labels):
            raise ValueError(f"answers must be to the labels of train, {list(labels)}, got {dict(answers)}")
        ids = {label: tokenizer(answers[label], add_special_tokens=False)["input_ids"] for label in labels}
        for label, found in ids.items():
            if len(found) != 1:
                raise ValueError(f"answers must be one token each, got {answers[label]!r}, which is {len(found)}")
        tokens = tuple(found[0] for found in ids.values())
        if len(set(tokens)) < len(tokens):
            raise ValueError(f"answers must be different tokens, got {dict(answers)} as {list(tokens)}")
        return cls(tokens)

    def logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The answers' logits of shape (batch, classes), where the answer is expected.

        Args:
            logits: Shape (batch, length, vocabulary).
            labels: Shape (batch, length), int64: the right answer's id at its place, and -100 elsewhere.
        """
        place = (labels != _IGNORED).int().argmax(dim=1) - 1
        found = logits.gather(1, place[:, None, None].expand(-1, 1, logits.shape[-1]))
        return found[:, 0, list(self.tokens)]

    def classes(self, labels: NDArray[Any]) -> NDArray[Any]:
        """Classes of shape (n,), of labels of shape (n, length)."""
        answer = labels.max(axis=1, keepdims=True)
        found: NDArray[Any] = (answer == np.array(self.tokens)).argmax(axis=1)
        return found


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: int, max_length: int
) -> dict[str, list[int]]:
    """An example: the last tokens of the prompt, and the answer, which alone has a label.

    Args:
        tokenizer: Of the model.
        prompt: The example as the model reads it.
        answer: Id of the token that follows.
        max_length: Tokens of an example at most.
    """
    ids = tokenizer(prompt, verbose=False)["input_ids"][1 - max_length :]
    labels = [_IGNORED] * len(ids) + [answer]
    return {"input_ids": [*ids, answer], "attention_mask": [1] * len(labels), "labels": labels}


def collate_prompts(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A batch of examples of different lengths, and blocks of text among them, padded on the right."""
    tokenizer.padding_side = "right"
    batch: dict[str, Tensor] = DataCollatorForSeq2Seq(tokenizer)(
        [{name: [*map(int, values)] for name, values in example.items()} for example in examples]
    )
    return batch

"""Classification and regression on sentence embeddings: a head for encoders that were trained to embed."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

__all__ = ["SentenceClassifier", "collate_sentences"]


class SentenceClassifier(PreTrainedModel):
    """A linear head on the embeddings of one sentence u, or of two, u and v, that are encoded apart.

    An embedding is the mean of the encoder's last states over the sentence's tokens, scaled to norm sqrt(d). Of two
    sentences the head sees u, v, |u - v| and u * v, d features each.

    Args:
        encoder: Returns states first. Its configuration has ``num_labels``, and ``problem_type`` "regression" for a
            score. Its pooler, whose weights would get no gradient, is left out.
        num_sentences: Of an example, 1 or 2.

    Attributes:
        encoder: The encoder.
        classifier: The head, new.
    """

    base_model_prefix = "encoder"
    _supports_sdpa = True

    def __init__(self, encoder: PreTrainedModel, num_sentences: int) -> None:
        config = encoder.config
        super().__init__(config)
        features = {1: 1, 2: 4}[num_sentences]
        self.classifier = nn.Linear(features * config.hidden_size, config.num_labels)
        self.post_init()
        encoder.pooler = None
        # After the weights were initialised: the encoder has its own.
        self.encoder = encoder

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=getattr(self.config, "initializer_range", 0.02))
            nn.init.zeros_(module.bias)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **options: Any
    ) -> SequenceClassifierOutput:
        """Logits of shape (batch, num_labels), and the loss (cross-entropy, or the mean squared error of a score).

        Args:
            input_ids: Tokens of shape (batch, sentences, length).
            attention_mask: 1 for tokens and 0 for padding, of the same shape.
            labels: Classes of shape (batch,), int64, or scores, float; None for no loss.
            options: For the encoder.
        """
        batch, sentences, _ = input_ids.shape
        mask = attention_mask.flatten(0, 1)
        states = self.encoder(input_ids=input_ids.flatten(0, 1), attention_mask=mask, **options)[0]
        mean = (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        embedding = functional.normalize(mean, dim=-1) * mean.shape[-1] ** 0.5
        u, *others = embedding.view(batch, sentences, -1).unbind(dim=1)
        features = torch.cat([u] + [part for v in others for part in (v, (u - v).abs(), u * v)], dim=-1)
        logits = self.classifier(features)
        if labels is None:
            loss = None
        elif self.config.problem_type == "regression":
            loss = functional.mse_loss(logits.squeeze(-1).float(), labels.float())
        else:
            loss = functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def collate_sentences(tokenizer: PreTrainedTokenizerBase, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch: "input_ids" and "attention_mask" of shape (batch, sentences, length), and "labels" of shape (batch,).

    Args:
        tokenizer: Which pads.
        examples: With "labels", and "input_ids" of their sentences in turn, each as many as "lengths" tells.
    """
    sentences = []
    for example in examples:
        tokens = iter(example["input_ids"])
        sentences += [{"input_ids": [*islice(tokens, length)]} for length in example["lengths"]]
    padded = tokenizer.pad(sentences, return_tensors="pt")
    shape = (len(examples), len(examples[0]["lengths"]), -1)
    labels = torch.tensor([example["labels"] for example in examples])
    return {name: padded[name].view(shape) for name in ("input_ids", "attention_mask")} | {"labels": labels}

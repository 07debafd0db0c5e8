"""The layer of transformers' cache that keeps embeddings, in a module of its own: transformers is imported late."""

from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer


class EmbeddingsLayer(LinearAttentionLayer):  # type: ignore[misc]
    """A layer of transformers' cache that keeps the last embeddings, in the place of a convolution's state."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See transformers."""
        self.conv_states[0] = self.conv_states[0].repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """See transformers."""
        self.conv_states[0] = self.conv_states[0][indices, ...]

    def crop(self, max_length: int) -> None:
        """Refuse.

        Raises:
            NotImplementedError: Always: the embeddings before the last ones are not kept.
        """
        raise NotImplementedError(
            "tokens cannot be taken back from this cache, as it keeps the embeddings of the last ones alone: assisted "
            "generation (assistant_model, prompt_lookup_num_tokens) is not supported by adapters and converted models "
            "whose layers see embeddings"
        )

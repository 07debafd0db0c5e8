"""The weights of the regularisers."""

from dataclasses import dataclass

from torchdsc.arguments import check_at_least, check_not_negative, check_positive, check_types


@dataclass(frozen=True)
class RegularizerWeights:
    """Weights of equation (13) and the constants of its terms; see :class:`torchdsc.DSCOptions`.

    Raises:
        TypeError: If a value has another type.
        ValueError: If a weight is negative or not finite, by the name that layers give it, or a constant out of range.
    """

    aux: float = 0.0
    budget: float = 0.0
    frame: float = 0.0
    z: float = 0.0
    budget_target: float = 1.0
    frame_normalized: bool = False
    frame_samples: int | None = None
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check_types(RegularizerWeights, vars(self))
        check_not_negative(aux_weight=self.aux, budget_weight=self.budget, frame_weight=self.frame, z_weight=self.z)
        check_not_negative(budget_target=self.budget_target)
        check_at_least(2, frame_samples=self.frame_samples)
        check_positive(eps=self.eps)

    @property
    def need_logits(self) -> bool:
        """Whether a term needs the softmax over all atoms."""
        return self.aux > 0 or self.z > 0

    @property
    def need_tokens(self) -> bool:
        """Whether a term depends on the data."""
        return self.need_logits or self.budget > 0

    @property
    def any(self) -> bool:
        """Whether any term has a weight."""
        return self.need_tokens or self.frame > 0

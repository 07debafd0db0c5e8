"""Statistics of forward passes, kept until the regularisers are collected."""

import itertools
import warnings
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

_WAYS_OUT = (
    "Give a Hugging Face model its labels and use the loss it returns; put torchdsc.RegularizedLoss before the class "
    "of a trainer that computes its loss outside the model; in a loop of your own add "
    "torchdsc.regularization(model).total to the loss; or set aux_weight, budget_weight, frame_weight and z_weight to 0"
)
UNCOLLECTED = (
    "the regularisers of a forward pass in training were not collected before its backward pass, so that they are in "
    f"no loss. {_WAYS_OUT}. Under activation checkpointing pass use_reentrant=False"
)
UNUSED = (
    "the model's loss, which holds the regularisers, is not in the loss of this backward pass. Use it, or leave labels "
    f"out of the call. {_WAYS_OUT}"
)
UNADDED = (
    "the regularisers were collected, but a backward pass goes through the layers without them: they are not in its "
    "loss. Add torchdsc.regularization(model).total to the loss, or differentiate it first; or set aux_weight, "
    "budget_weight, frame_weight and z_weight to 0"
)
WITHOUT_GRADIENT = (
    "the regularisers of a routed layer carry no gradient although its router wants one: its forward pass ran under "
    "reentrant checkpointing (pass use_reentrant=False) or under torch.no_grad"
)

# Torch 2.6 has no is_exporting; bool() is False.
_is_exporting = getattr(torch.compiler, "is_exporting", bool)
_numbers = itertools.count(1)


def next_number() -> int:
    """A number greater than that of every forward pass so far."""
    return next(_numbers)


class RoutingStatistics(NamedTuple):
    """Sums over the counted tokens of one forward pass, in the dtype of the router's logits.

    Attributes:
        num_tokens: Counted tokens, scalar.
        probability_sum: Sum of the softmax over atoms, of shape (M,); equation (9). Empty if not needed.
        strength_sum: Sum of the signal strengths S, scalar; equation (10).
        squared_log_normalizer_sum: Sum of ``logsumexp(r)^2``, scalar; equation (12).
        load: How often each expert was selected, of shape (N,), for the load balance of Mixture-of-Experts, probability
            times load; None for the squared probability of equation (9).
    """

    num_tokens: Tensor
    probability_sum: Tensor
    strength_sum: Tensor
    squared_log_normalizer_sum: Tensor
    load: Tensor | None = None


class Use:
    """Whether a backward pass has come through what was collected from some forward passes."""

    def __init__(self) -> None:
        self.is_seen = False

    def see(self, gradient: Tensor | None = None) -> None:
        """The hook of what was collected."""
        self.is_seen = True


class _Left:
    """The statistics of one forward pass; None if only L_frame is to be collected.

    A hook of the pass's output holds this object, so that it lives as long as the output's autograd graph.
    """

    def __init__(self, statistics: RoutingStatistics | None, is_wanted: bool) -> None:
        self.statistics, self.is_wanted, self.number = statistics, is_wanted, next_number()
        self.is_taken = False
        self.use: Use | None = None

    def take(self, use: Use | None) -> RoutingStatistics | None:
        statistics, self.statistics, self.is_taken, self.use = self.statistics, None, True, use
        return statistics

    def check(self, gradient: Tensor) -> None:
        """The hook, which runs when a backward pass goes through the output."""
        if self.is_wanted and not self.is_taken:
            raise RuntimeError(UNCOLLECTED)
        if self.is_wanted and self.use is not None and not self.use.is_seen:
            # Not an error: a loop may differentiate its losses one by one. Once for each collection.
            self.use.see()
            warnings.warn(UNADDED, RuntimeWarning, stacklevel=2)


class StatisticsLog:
    """The uncollected statistics of one layer, oldest first.

    The log does not own them: the autograd graph of each forward pass's output does. When the output is gone, nothing
    can be trained through that pass, and its statistics are gone too: they take no memory and do not count in the next
    loss. A backward pass through an output whose statistics have not been collected raises.

    Of passes without a graph (``torch.no_grad``) only the last one's statistics are kept. Inside ``torch.compile``,
    where an output cannot own anything, statistics are kept until they are collected.
    """

    def __init__(self) -> None:
        self._left: list[weakref.ref[_Left]] = []
        self._compiled: list[RoutingStatistics | None] = []
        self._without_graph: _Left | None = None

    def leave(self, statistics: RoutingStatistics | None, output: Tensor, *, is_wanted: bool) -> None:
        """Leave the statistics of a forward pass.

        The forward pass that activation checkpointing recomputes is not counted: its output, and so its statistics, are
        dropped at once.

        Args:
            statistics: Of the pass; None if only L_frame is to be collected.
            output: What the pass returns, of any shape.
            is_wanted: Whether the regularisers have a parameter to train.
        """
        if torch.compiler.is_compiling():
            # An exported program cannot keep statistics, which are no output of it.
            if not _is_exporting():
                self._compiled.append(statistics)
            return
        left = _Left(statistics, is_wanted)
        if not output.requires_grad:
            self._without_graph = left
            return
        output.register_hook(left.check)  # type: ignore[no-untyped-call]
        self._left = [*(weakref.ref(other) for other in self._waiting()), weakref.ref(left)]

    def take(self, since: int = 0, use: Use | None = None) -> list[RoutingStatistics]:
        """Return and forget the statistics that wait.

        Args:
            since: Take only those of passes after :func:`next_number` returned this number.
            use: What a backward pass through the outputs of these passes must have seen before, or it warns.

        Returns:
            Statistics with a graph; if there are none, those of the last pass without one.
        """
        taken, self._compiled = self._compiled, []
        if not torch.compiler.is_compiling():
            last, self._without_graph = self._without_graph, None
            found = [left for left in self._waiting() if left.number >= since]
            if not found and last is not None and last.number >= since:
                found = [last]
            taken += [left.take(use) for left in found]
        return [statistics for statistics in taken if statistics is not None]

    def waits(self, since: int = 0, *, wanted: bool = True) -> bool:
        """Whether the statistics of a pass wait to be collected.

        Args:
            since: See :meth:`take`.
            wanted: Ignore passes whose regularisers have no parameter to train.
        """
        if self._compiled or torch.compiler.is_compiling():
            return bool(self._compiled)
        waiting = self._waiting() + ([] if self._without_graph is None else [self._without_graph])
        return any((left.is_wanted or not wanted) and left.number >= since for left in waiting)

    def _waiting(self) -> list[_Left]:
        alive = (reference() for reference in self._left)
        return [left for left in alive if left is not None and not left.is_taken]

    def __len__(self) -> int:
        return len(self._compiled) + len(self._waiting())

    def __deepcopy__(self, memo: dict[int, object]) -> "StatisticsLog":
        # Statistics belong to an autograd graph: a copied module starts without any.
        return StatisticsLog()

    def __reduce__(self) -> tuple[type["StatisticsLog"], tuple[()]]:
        return StatisticsLog, ()

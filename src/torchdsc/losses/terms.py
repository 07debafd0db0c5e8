"""The terms of equation (13), a function for each of equations (9) to (12)."""

from torch import Tensor, nn

from torchdsc.nn.bank import FrameEstimate


def aux_loss(probability_sum: Tensor, num_tokens: Tensor | float, load: Tensor | None = None) -> Tensor:
    """Load balance, equation (9): ``L_aux = M sum_j P_j^2``, whose minimum 1 is at uniform probabilities P.

    With ``load`` it is the load balance of Mixture-of-Experts, ``N sum_j P_j f_j``, where f_j is the share of tokens
    that select expert j; it is K when uniform.

    Args:
        probability_sum: Sum over tokens of the router's softmax, of shape (M,).
        num_tokens: Tokens summed over.
        load: How often each expert was selected, of shape (M,).

    Returns:
        Scalar.
    """
    other = probability_sum if load is None else load
    return probability_sum.shape[0] * (probability_sum / num_tokens * (other / num_tokens)).sum()


def budget_loss(strength_sum: Tensor, num_tokens: Tensor | float, budget: float = 1.0) -> Tensor:
    """Activation budget, equation (10): ``L_budget = max(0, mu - mean S)^2``.

    Args:
        strength_sum: Sum over tokens of the signal strength S, scalar.
        num_tokens: Tokens summed over.
        budget: mu.

    Returns:
        Scalar.
    """
    return (budget - strength_sum / num_tokens).clamp_min(0.0).square()


def z_loss(squared_log_normalizer_sum: Tensor, num_tokens: Tensor | float) -> Tensor:
    """Router z-loss, equation (12): ``L_z = mean (logsumexp_j r_j)^2``.

    Args:
        squared_log_normalizer_sum: Sum over tokens of the squared ``logsumexp`` of the logits, scalar.
        num_tokens: Tokens summed over.

    Returns:
        Scalar.
    """
    return squared_log_normalizer_sum / num_tokens


def frame_loss(bank: nn.Module, eps: float = 1e-6, *, normalized: bool = False, samples: int | None = None) -> Tensor:
    """Frame potential of both sides of a bank, equation (11).

    With ``samples`` it is an unbiased estimate from that many rows, drawn without replacement.

    Args:
        bank: A :class:`torchdsc.BasisBank`, or a module around one with the same ``forward``.
        eps: Lower bound of a row's norm.
        normalized: Divide by the M (M - 1) pairs of a side. The result, a mean squared coherence, does not grow with M.
        samples: Number of rows to estimate it from, at least 2; by default, or if M is no larger, all.

    Returns:
        Scalar, differentiable in the bank's rows.

    Raises:
        RuntimeError: If the bank's rows are part of a flattened parameter of FSDP1.
    """
    potential: Tensor = bank(None, eps=eps, frame=FrameEstimate(normalized, samples))
    return potential

"""The options of a DSC layer: one frozen dataclass, shared by layers, models and adapters."""

from dataclasses import dataclass
from typing import Literal

from torchdsc.arguments import check_at_least, check_finite, check_not_negative, check_positive, check_types
from torchdsc.ops.compose.api import Implementation
from torchdsc.ops.gate import GateKind

from .statistics import RegularizerWeights

RouterKind = Literal["linear", "low_rank", "product_key"]
Activation = Literal["none", "relu"]
RouterNorm = Literal["layer", "layer_affine", "none"]


@dataclass(frozen=True)
class DSCOptions:
    """What a DSC layer is made of. The defaults are Algorithm 2 with the paper's weights.

    Attributes:
        num_atoms: M, atoms in the bank.
        top_k: K, atoms composed per token, 1 <= K <= M.
        router: "linear" (d_in M parameters), "low_rank" (d_in r + r M) or "product_key" (two halves of sqrt(M) keys, so
            that millions of atoms can be searched; M must be a square).
        router_rank: r of "low_rank", d_in / 4 by default; features of a head's query of "product_key", even, d_in / 2
            by default.
        router_heads: Queries of "product_key", each of which selects K / router_heads atoms.
        router_bias: Whether the router's logits have a bias (the published run's have, the paper's have not).
        router_norm: What the router sees of x: "layer" its parameter-free LayerNorm (Algorithm 2), "layer_affine" one
            with parameters (the published run), "none" x itself (Algorithm 1).
        router_init_std: Standard deviation of a linear router's initial weight, > 0; others start with logits of its
            spread. That of the model around it, or 0.02, by default.
        channelwise_gamma: One output scale per channel (Algorithm 2) or a single one (Algorithm 1).
        gamma_init: Initial value of gamma. At 0 the layer changes nothing until gamma has moved, and the regularisers
            of its bank and router have no weight until then.
        scale: Constant factor of the output, > 0, as LoRA's alpha / r: an optimizer moves scale x gamma by scale times
            its learning rate.
        atom_init_norm: Root mean square norm of the raw rows of an orthogonal init. Outputs do not depend on it, the
            step that a learning rate makes does: direction changes go with step over norm.
        logit_clamp: tau, > 0.
        eps: Stability constant of norms and of the gate, > 0.
        activation: Of the latent values x . u_k: "none", equation (14), or "relu", which leaves out the atoms that a
            token is on the negative side of. It is 1-Lipschitz, and the bound on dW holds as it is.
        gate: "sum" for tanh(S), equation (5); "mean" for tanh(S / K); "none", which cannot be trained with one atom.
        z_loss_on_raw_logits: Take equation (12) on unclamped logits, whose gradient can bring a clamped one back.
        frame_normalized: Take equation (11) per pair of atoms, so that its weight does not depend on M.
        aux_weight: Weight of L_aux, equation (9).
        budget_weight: Weight of L_budget, equation (10).
        frame_weight: Weight of L_frame, equation (11).
        z_weight: Weight of L_z, equation (12).
        frame_samples: Rows of the bank that L_frame is estimated from, drawn anew at each collection; all by default.
        sparse_gradients: Give the bank row-sparse gradients, of the selected and sampled rows alone: for banks too
            large for dense ones. The optimizer must take them (``torch.optim.SparseAdam``, ``SGD``).
        budget: mu, the activation budget of equation (10).
        impl: Implementation of the composition; "auto" chooses by measured crossovers.

    Raises:
        TypeError: If an option has another type.
        ValueError: If one is out of its range, or does not go with the others.
    """

    num_atoms: int
    top_k: int
    router: RouterKind = "linear"
    router_rank: int | None = None
    router_heads: int = 1
    router_bias: bool = False
    router_norm: RouterNorm = "layer"
    router_init_std: float | None = None
    channelwise_gamma: bool = True
    gamma_init: float = 0.1
    scale: float = 1.0
    atom_init_norm: float = 0.01
    logit_clamp: float = 20.0
    eps: float = 1e-6
    activation: Activation = "none"
    gate: GateKind = "sum"
    z_loss_on_raw_logits: bool = False
    frame_normalized: bool = False
    aux_weight: float = 0.01
    budget_weight: float = 0.01
    frame_weight: float = 0.001
    z_weight: float = 1e-4
    budget: float = 1.0
    frame_samples: int | None = None
    sparse_gradients: bool = False
    impl: Implementation = "auto"

    def __post_init__(self) -> None:
        check_types(DSCOptions, vars(self))
        check_at_least(1, num_atoms=self.num_atoms, top_k=self.top_k, router_heads=self.router_heads)
        check_at_least(1, router_rank=self.router_rank)
        check_at_least(2, frame_samples=self.frame_samples)
        if self.top_k > self.num_atoms:
            raise ValueError(f"top_k must be at most num_atoms = {self.num_atoms}, got {self.top_k}")
        check_positive(logit_clamp=self.logit_clamp, eps=self.eps, scale=self.scale)
        check_positive(atom_init_norm=self.atom_init_norm, router_init_std=self.router_init_std)
        check_not_negative(aux_weight=self.aux_weight, budget_weight=self.budget_weight, budget=self.budget)
        check_not_negative(frame_weight=self.frame_weight, z_weight=self.z_weight)
        check_finite(gamma_init=self.gamma_init)
        if self.sparse_gradients and self.frame_weight > 0 and self.frame_samples is None:
            raise ValueError("frame_samples must be given for sparse_gradients with frame_weight > 0, got None")
        self._check_router()

    def _check_router(self) -> None:
        if self.router == "linear" and self.router_rank is not None:
            raise ValueError(f"router_rank must be None for router = 'linear', got {self.router_rank}")
        if self.router != "product_key":
            if self.router_heads != 1:
                raise ValueError(f"router_heads must be 1 for router = {self.router!r}, got {self.router_heads}")
            return
        if self.router_rank is not None and (self.router_rank < 2 or self.router_rank % 2):
            raise ValueError(f"router_rank must be even and >= 2 for product keys, got {self.router_rank}")
        if self.router_bias:
            raise ValueError("router_bias must be False for router = 'product_key', got True")
        if self.top_k % self.router_heads:
            raise ValueError(f"top_k must be a multiple of router_heads = {self.router_heads}, got {self.top_k}")

    @property
    def regularizers(self) -> RegularizerWeights:
        """Weights and constants of equation (13)."""
        return RegularizerWeights(
            aux=self.aux_weight,
            budget=self.budget_weight,
            frame=self.frame_weight,
            z=self.z_weight,
            budget_target=self.budget,
            frame_normalized=self.frame_normalized,
            frame_samples=self.frame_samples,
            eps=self.eps,
        )

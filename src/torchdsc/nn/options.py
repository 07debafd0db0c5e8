"""Options of a DSC layer, from which layers, models and adapters are configured."""

from dataclasses import FrozenInstanceError, dataclass
from typing import Any, Literal, TypedDict

from torchdsc.arguments import check_at_least, check_finite, check_not_negative, check_positive, check_types
from torchdsc.kinds import RouterKind
from torchdsc.ops.compose.api import Implementation
from torchdsc.ops.gate import GateKind

from .regularizers import RegularizerWeights

RouterNorm = Literal["layer", "layer_affine", "none"]
Activation = Literal["none", "relu"]


# How much larger than its bound scale gamma may be at the start.
_MOST_BENT = 4


class AssignedOnce:
    """Options are checked together, so none can be assigned afterwards; ``dataclasses.replace`` makes a new set."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            raise FrozenInstanceError(f"cannot assign to field {name!r}")
        super().__setattr__(name, value)


@dataclass(kw_only=True)
class RouterFields:
    """How atoms are scored.

    Attributes:
        router: "linear" (d_in M parameters), "low_rank" (d_in r + r M), "product_key" (two halves of sqrt(M) keys, so
            that millions of atoms can be searched; M must be a square) or "ngram" (no parameters: the last tokens are
            hashed to K atoms, see :class:`torchdsc.nn.NgramRouter`; L_aux, L_budget and L_z do not apply).
        router_rank: For "low_rank" the rank r, by default d_in / 4; for "product_key" the features of a head's query,
            even, by default d_in / 2.
        router_heads: Number of queries of "product_key", each of which selects K / router_heads atoms.
        router_bias: Whether the router's logits have a bias (yes in the published run, no in the paper).
        router_norm: Normalisation of the router's input: "layer" for LayerNorm without parameters (Algorithm 2),
            "layer_affine" for LayerNorm with parameters (the published run), "none" (Algorithm 1).
        router_init_std: Standard deviation of a linear router's initial weight, > 0; other routers are initialised to
            logits of the same standard deviation. By default that of the model, or 0.02.
        logit_clamp: tau, the bound that logits are clamped to, > 0.
    """

    router: RouterKind = "linear"
    router_rank: int | None = None
    router_heads: int = 1
    router_bias: bool = False
    router_norm: RouterNorm = "layer"
    router_init_std: float | None = None
    logit_clamp: float = 20.0


@dataclass(kw_only=True)
class RegularizerFields:
    """Weights and constants of equation (13).

    Attributes:
        aux_weight: Weight of L_aux, equation (9).
        budget_weight: Weight of L_budget, equation (10).
        frame_weight: Weight of L_frame, equation (11).
        z_weight: Weight of L_z, equation (12).
        budget: mu, the activation budget of equation (10).
        frame_normalized: Divide L_frame by the number of pairs of atoms, so that its weight does not depend on M.
        frame_samples: Number of atoms that L_frame is estimated from, drawn anew at each collection; by default all.
        z_loss_on_raw_logits: Take L_z of unclamped logits, whose gradient can bring a clamped logit back into range.
    """

    aux_weight: float = 0.01
    budget_weight: float = 0.01
    frame_weight: float = 0.001
    z_weight: float = 1e-4
    budget: float = 1.0
    frame_normalized: bool = False
    frame_samples: int | None = None
    z_loss_on_raw_logits: bool = False


@dataclass(kw_only=True)
class DSCFields(RouterFields, RegularizerFields):
    """All options of a DSC layer; see :class:`DSCOptions`.

    Attributes:
        num_atoms: M, atoms in the bank.
        top_k: K, atoms composed per token, 1 <= K <= M.
        channelwise_gamma: One output scale per channel (Algorithm 2) or a single one (Algorithm 1).
        gamma_init: Initial value of gamma. At 0 the layer outputs zero, and its regularisers have no weight, until
            gamma has moved.
        scale: Constant factor of the output, > 0, as LoRA's alpha / r. It also multiplies the effective learning rate
            of gamma.
        max_update_norm: m, a bound that |dW|_2 of no token exceeds (up to rounding), whatever is trained: the output is
            scaled by ``s / (1 + |s| / m)`` in place of s = ``scale gamma``. None for no other bound than gamma's.
        atom_init_norm: Root mean square norm of the raw rows at the start, which are orthogonal. Outputs do not depend
            on it, but training does: the larger the norm, the less a step turns an atom.
        eps: Stability constant of norms and of the gate, > 0.
        atom_features: r, for thin atoms: they act on r features, to which x is projected by a matrix P, and from which
            the composed output is projected by Q. At equal bytes there are d / r times as many. None for none.
        offset: Whether atoms also see a constant, so that each can add a vector whatever x is: (x, sqrt(d)) in place of
            x, and unit rows u of d + 1 features.
        activation: Of the latent values x . u_k: "none", equation (14), or "relu", which drops atoms whose latent value
            is negative. The bound on dW holds for both.
        gate: "sum" for tanh(S), equation (5); "mean" for tanh(S / K); "none", which cannot be trained with top_k = 1.
        sparse_gradients: Give the bank row-sparse gradients, which hold only the selected and sampled rows, for banks
            too large for dense gradients. The optimizer must support them (``torch.optim.SparseAdam``, ``SGD``).
        impl: Implementation of the composition; "auto" chooses by measured crossovers.
    """

    num_atoms: int
    top_k: int
    channelwise_gamma: bool = True
    gamma_init: float = 0.1
    scale: float = 1.0
    max_update_norm: float | None = None
    atom_init_norm: float = 0.01
    eps: float = 1e-6
    atom_features: int | None = None
    offset: bool = False
    activation: Activation = "none"
    gate: GateKind = "sum"
    sparse_gradients: bool = False
    impl: Implementation = "auto"


@dataclass(kw_only=True, unsafe_hash=True)
class DSCOptions(AssignedOnce, DSCFields):
    """Options of a DSC layer; the defaults are Algorithm 2 with the paper's weights.

    The fields, which are keyword-only, are those of :class:`RouterFields`, :class:`RegularizerFields` and
    :class:`DSCFields`. They cannot be assigned afterwards; use ``dataclasses.replace``.

    Raises:
        TypeError: If an option has another type.
        ValueError: If one is out of its range, or does not go with the others.
    """

    def __post_init__(self) -> None:
        check_types(DSCOptions, vars(self))
        check_at_least(1, num_atoms=self.num_atoms, top_k=self.top_k, router_heads=self.router_heads)
        check_at_least(1, router_rank=self.router_rank, atom_features=self.atom_features)
        check_at_least(2, frame_samples=self.frame_samples)
        if self.top_k > self.num_atoms:
            raise ValueError(f"top_k must be at most num_atoms = {self.num_atoms}, got {self.top_k}")
        check_positive(logit_clamp=self.logit_clamp, eps=self.eps, scale=self.scale)
        check_positive(atom_init_norm=self.atom_init_norm, router_init_std=self.router_init_std)
        check_positive(max_update_norm=self.max_update_norm)
        if self.max_update_norm is not None and self.scale * abs(self.gamma_init) > _MOST_BENT * self.max_update_norm:
            raise ValueError(
                f"max_update_norm must be at least scale |gamma_init| / {_MOST_BENT} = "
                f"{self.scale * abs(self.gamma_init) / _MOST_BENT:g}, or gamma would hardly learn, got "
                f"{self.max_update_norm}"
            )
        if self.max_update_norm is not None and self.atom_features is not None:
            raise ValueError(
                f"max_update_norm must be None for thin atoms, whose projections it does not bound, got "
                f"{self.max_update_norm}"
            )
        check_not_negative(aux_weight=self.aux_weight, budget_weight=self.budget_weight, budget=self.budget)
        check_not_negative(frame_weight=self.frame_weight, z_weight=self.z_weight)
        check_finite(gamma_init=self.gamma_init)
        if self.sparse_gradients and self.frame_weight > 0 and self.frame_samples is None:
            raise ValueError("frame_samples must be given for sparse_gradients with frame_weight > 0, got None")
        self._check_router()

    def _check_router(self) -> None:
        if self.router in ("linear", "ngram") and self.router_rank is not None:
            raise ValueError(f"router_rank must be None for router = {self.router!r}, got {self.router_rank}")
        if self.router == "ngram" and self.router_bias:
            raise ValueError("router_bias must be False for router = 'ngram', got True")
        # Options of a product that is not there.
        idle = {"router_norm": "layer", "router_init_std": None, "z_loss_on_raw_logits": False}
        for name, value in idle.items() if self.router == "ngram" else ():
            if getattr(self, name) != value:
                raise ValueError(f"{name} must be {value!r} for router = 'ngram', got {getattr(self, name)!r}")
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
        # No logit of an n-gram router can be trained.
        routes = self.router != "ngram"
        return RegularizerWeights(
            aux=self.aux_weight * routes,
            budget=self.budget_weight * routes,
            frame=self.frame_weight,
            z=self.z_weight * routes,
            budget_target=self.budget,
            frame_normalized=self.frame_normalized,
            frame_samples=self.frame_samples,
            eps=self.eps,
        )


class DSCArguments(TypedDict, total=False):
    """The fields of :class:`DSCOptions` as keywords, for editors and type checkers."""

    num_atoms: int
    top_k: int
    router: RouterKind
    router_rank: int | None
    router_heads: int
    router_bias: bool
    router_norm: RouterNorm
    router_init_std: float | None
    logit_clamp: float
    aux_weight: float
    budget_weight: float
    frame_weight: float
    z_weight: float
    budget: float
    frame_normalized: bool
    frame_samples: int | None
    z_loss_on_raw_logits: bool
    channelwise_gamma: bool
    gamma_init: float
    scale: float
    max_update_norm: float | None
    atom_init_norm: float
    eps: float
    atom_features: int | None
    offset: bool
    activation: Activation
    gate: GateKind
    sparse_gradients: bool
    impl: Implementation

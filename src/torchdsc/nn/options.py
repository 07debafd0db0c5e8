"""The options of a DSC layer and of what it sees, in parts that layers, models and adapters are configured by."""

from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass, fields
from typing import Any, Literal, TypedDict, Unpack

from torchdsc.arguments import check_at_least, check_finite, check_not_negative, check_positive, check_types
from torchdsc.ops.compose.api import Implementation
from torchdsc.ops.gate import GateKind

from .regularizers import RegularizerWeights

RouterKind = Literal["linear", "low_rank", "product_key"]
RouterInput = Literal["hidden", "embeddings"]
RouterNorm = Literal["layer", "layer_affine", "none"]
Activation = Literal["none", "relu"]


class _AssignedOnce:
    """Options that were checked together are not changed one by one; ``dataclasses.replace`` makes others."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            raise FrozenInstanceError(f"cannot assign to field {name!r}")
        super().__setattr__(name, value)


@dataclass(kw_only=True)
class RouterFields:
    """How atoms are scored.

    Attributes:
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
        logit_clamp: tau, > 0.
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
        frame_normalized: Take equation (11) per pair of atoms, so that its weight does not depend on M.
        frame_samples: Rows of the bank that L_frame is estimated from, drawn anew at each collection; all by default.
        z_loss_on_raw_logits: Take equation (12) on unclamped logits, whose gradient can bring a clamped one back.
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
    """All that a DSC layer is made of; see :class:`DSCOptions`.

    Attributes:
        num_atoms: M, atoms in the bank.
        top_k: K, atoms composed per token, 1 <= K <= M.
        channelwise_gamma: One output scale per channel (Algorithm 2) or a single one (Algorithm 1).
        gamma_init: Initial value of gamma. At 0 the layer changes nothing until gamma has moved, and the regularisers
            of its bank and router have no weight until then.
        scale: Constant factor of the output, > 0, as LoRA's alpha / r: an optimizer moves scale x gamma by scale times
            its learning rate.
        atom_init_norm: Root mean square norm of the raw rows of an orthogonal init. Outputs do not depend on it, the
            step that a learning rate makes does: direction changes go with step over norm.
        eps: Stability constant of norms and of the gate, > 0.
        activation: Of the latent values x . u_k: "none", equation (14), or "relu", which leaves out the atoms that a
            token is on the negative side of. It is 1-Lipschitz, and the bound on dW holds as it is.
        gate: "sum" for tanh(S), equation (5); "mean" for tanh(S / K); "none", which cannot be trained with one atom.
        sparse_gradients: Give the bank row-sparse gradients, of the selected and sampled rows alone: for banks too
            large for dense ones. The optimizer must take them (``torch.optim.SparseAdam``, ``SGD``).
        impl: Implementation of the composition; "auto" chooses by measured crossovers.
    """

    num_atoms: int
    top_k: int
    channelwise_gamma: bool = True
    gamma_init: float = 0.1
    scale: float = 1.0
    atom_init_norm: float = 0.01
    eps: float = 1e-6
    activation: Activation = "none"
    gate: GateKind = "sum"
    sparse_gradients: bool = False
    impl: Implementation = "auto"


@dataclass(kw_only=True, unsafe_hash=True)
class DSCOptions(_AssignedOnce, DSCFields):
    """What a DSC layer is made of; the defaults are Algorithm 2 with the paper's weights.

    The fields, by keyword, are those of its parts: :class:`RouterFields`, :class:`RegularizerFields` and
    :class:`DSCFields`. They cannot be changed afterwards; ``dataclasses.replace`` makes others.

    Raises:
        TypeError: If an option has another type.
        ValueError: If one is out of its range, or does not go with the others.
    """

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


@dataclass(kw_only=True)
class ContextFields:
    """What layers and their routers see of a sequence besides each token's own hidden state.

    Attributes:
        router_input: What routers see: "hidden", what their layers do, or "embeddings", those of the tokens, normalised
            and without positions.
        router_context: Tokens whose mix a router sees, a token's own and those before it; 1 for its own alone.
        input_context: Tokens whose embeddings are mixed, a token's own and those before it, and added to what a layer
            sees; 1 for none.
    """

    router_input: RouterInput = "hidden"
    router_context: int = 1
    input_context: int = 1


@dataclass(kw_only=True, unsafe_hash=True)
class ContextOptions(_AssignedOnce, ContextFields):
    """:class:`ContextFields`, checked.

    Raises:
        TypeError: If an option has another type.
        ValueError: If one is out of its range, or does not go with the others.
    """

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_at_least(1, router_context=self.router_context, input_context=self.input_context)
        if self.input_context > 1 and self.router_context > 1 and self.router_input == "hidden":
            raise ValueError("router_input must be 'embeddings' for contexts of layer and router, got 'hidden'")

    @property
    def embeddings_are_seen(self) -> bool:
        """Whether a layer or a router sees those of the tokens."""
        return self.router_input == "embeddings" or self.input_context > 1

    @property
    def past_tokens(self) -> int:
        """Tokens before its own that a layer or a router sees."""
        return max(self.router_context, self.input_context) - 1

    @property
    def context_rows(self) -> int:
        """Rows of d parameters that the short convolutions add to a layer."""
        return sum(tokens for tokens in (self.router_context, self.input_context) if tokens > 1)


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
    atom_init_norm: float
    eps: float
    activation: Activation
    gate: GateKind
    sparse_gradients: bool
    impl: Implementation


class FeedForwardArguments(DSCArguments, total=False):
    """Those of a feed-forward layer: with the fields of :class:`ContextOptions`."""

    router_input: RouterInput
    router_context: int
    input_context: int


def recommended(**changes: Unpack[FeedForwardArguments]) -> FeedForwardArguments:
    """The settings that lie lowest at equal budgets in this project's studies; the defaults elsewhere are the paper's.

    Routers see the embeddings of a token and the two before it, mixed; layers see those of a token and the three before
    it, mixed, beside the hidden state. 32 atoms a token, gamma from 1, and no frame term.

    Args:
        **changes: Options of :class:`DSCOptions` and :class:`ContextOptions` beside these or in their place.
            ``num_atoms`` is required by whatever does not solve it for a budget.

    Returns:
        Keywords for :class:`torchdsc.DSCFeedForward` (whose defaults they are), :func:`torchdsc.convert`,
        ``feed_forward_options`` of DSCGPT, and ``DSCAdapterConfig``.

    Raises:
        TypeError: If an option is unknown.
    """
    unknown = [*changes.keys() - FeedForwardArguments.__annotations__.keys()]
    if unknown:
        raise TypeError(f"changes must be options of DSCOptions or ContextOptions, got {sorted(unknown)}")
    settings: FeedForwardArguments = {
        "top_k": 32,
        "gamma_init": 1.0,
        "frame_weight": 0.0,
        "router_input": "embeddings",
        "router_context": 3,
        "input_context": 4,
    }
    return {**settings, **changes}


def split_context(options: Mapping[str, Any]) -> tuple[ContextOptions, dict[str, Any]]:
    """Options of the context, and those that are left for the layer."""
    names = {field.name for field in fields(ContextFields)}
    own = {name: value for name, value in options.items() if name in names}
    return ContextOptions(**own), {name: value for name, value in options.items() if name not in names}

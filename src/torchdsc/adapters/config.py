"""Configurations of the adapters, in PEFT's form."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from peft import PeftConfig

from torchdsc.arguments import check_at_least, check_positive, check_types, own_copies
from torchdsc.nn import ContextOptions, DSCOptions, RegularizerWeights
from torchdsc.nn.context_options import ContextFields, split_context
from torchdsc.nn.options import DSCFields, RouterNorm
from torchdsc.ops.compose.api import Implementation

from .files import refuse_pickle
from .plugin import peft_type

# PEFT's name for all linear layers but the head.
ALL_LINEAR = "all-linear"


@dataclass
class AdapterConfig(PeftConfig):
    """Base class of the adapters' configurations: which modules to adapt.

    Args:
        target_modules: Names (or ends of names) of the modules to adapt, a regular expression as a string, or
            "all-linear". They may be linear layers, quantised or not, Conv1D, or modules that contain some, such as an
            MLP. By default those that PEFT's LoRA adapts in the architecture.
        exclude_modules: Names or regular expression of modules to leave out.
        layers_to_transform: Indices of the layers to adapt; by default all.
        layers_pattern: Attribute name of the list of layers, if it is an unusual one and ``layers_to_transform`` is
            given.
        modules_to_save: Other modules to train and save, such as a new head.
        in_features: d_in of targets that are not linear layers, given together with ``out_features``; by default found
            by running them without data, if possible.
        out_features: d_out of such targets.

    Raises:
        TypeError: If a field has another type.
        ValueError: If one is out of its range, or does not go with the others.
    """

    METHOD: ClassVar[str]

    target_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules to adapt."})
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layers to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules to train and save."})
    in_features: int | None = field(default=None, metadata={"help": "Input size of targets that are whole modules."})
    out_features: int | None = field(default=None, metadata={"help": "Output size of targets that are whole modules."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type(self.METHOD)
        own = {f.name for f in fields(self)} - {f.name for f in fields(PeftConfig)}
        check_types(type(self), {name: getattr(self, name) for name in own})
        own_copies(self)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list | tuple):
                setattr(self, name, set(getattr(self, name)))
        is_pattern = isinstance(self.target_modules, str) and self.target_modules.lower() != ALL_LINEAR
        for name in ("layers_to_transform", "layers_pattern"):
            if is_pattern and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} must be None where target_modules is a regular expression, got {getattr(self, name)!r} "
                    f"with target_modules = {self.target_modules!r}"
                )
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        check_at_least(1, **sizes)
        if (self.in_features is None) != (self.out_features is None):
            raise ValueError(f"in_features and out_features must be given together, got {sizes}")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError(f"layers_to_transform must be given with layers_pattern = {self.layers_pattern!r}")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """See PEFT; refuses a local folder that has its weights only as a pickle."""
        refuse_pickle(pretrained_model_name_or_path, subfolder)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)


@dataclass(kw_only=True)
class DSCAdapterConfig(AdapterConfig, DSCFields, ContextFields):
    """A DSC layer beside each target module: ``y = base(x) + scale gamma * ((x U_I^T) * z) V_I``.

    Gamma starts at zero, so that a fresh adapter changes nothing. Hugging Face models add the regularisers to their
    loss. For other models, and for losses computed outside the model (as in TRL's trainers), add
    ``torchdsc.regularization(model).total`` or set their weights to 0. In language models, adapters can be routed by
    token embeddings, for example with ``**torchdsc.recommended(num_atoms=64, gamma_init=0.0)``, or with
    ``router="ngram"`` by the last tokens: then the model must be called with token ids, and the salt of each target's
    router is the first number in its name.

    Args:
        share_bank: One bank for all target modules of the same sizes, instead of one for each.
        share_router: One router for all target modules of the same sizes. Short convolutions are not shared.
        bank_of: Name of another DSC adapter of the model, with the same targets and ``num_atoms``, whose banks this one
            uses. From then on these stay as they are, in both; routers, gamma and convolutions are trained, and they
            alone are saved. Load the other adapter first.
        train_atoms_only: Train atoms and their rows of the router alone; gamma, norms, projections and short
            convolutions stay as they are.
        atom_origins: Names of what atoms are there for: at first none or one, that of all, by default "first";
            :func:`torchdsc.adapters.add_atoms` adds to them. ``bank.origin`` has the index of each atom's. If there are
            several, and atoms are kept, atoms alone are trained.
        atom_counts: By the name of a target, M, how many atoms are kept, and how many of each origin ``freeze_atoms``
            keeps, where these were changed. Written by ``add_atoms``, ``freeze_atoms`` and ``remove_atoms``.
        bank_hash: Of the banks that an adapter with ``bank_of`` was saved over; loaded over others it raises.

    Fields of :class:`torchdsc.DSCOptions`, some with other defaults, and of :class:`torchdsc.nn.ContextOptions` are
    arguments too.

    Raises:
        TypeError: If a field has another type.
        ValueError: On an option out of its range.
    """

    METHOD = "DSC"

    share_bank: bool = field(default=False, metadata={"help": "One bank for all target modules of a shape."})
    share_router: bool = field(default=False, metadata={"help": "One router for all target modules of a shape."})
    bank_of: str | None = field(default=None, metadata={"help": "Adapter whose banks this one uses."})
    train_atoms_only: bool = field(default=False, metadata={"help": "Train atoms and their rows of the router alone."})
    atom_origins: list[str] | None = field(default=None, metadata={"help": "What atoms were added for."})
    atom_counts: dict[str, list[int]] | None = field(default=None, metadata={"help": "Atoms of changed targets."})
    bank_hash: str | None = field(default=None, metadata={"help": "Of the banks of bank_of."})
    num_atoms: int = field(default=64, metadata={"help": "M, atoms in a bank."})
    top_k: int = field(default=4, metadata={"help": "K, atoms composed per token."})
    gamma_init: float = field(default=0.0, metadata={"help": "0 for an adapter that starts as the identity."})
    scale: float = field(default=32.0, metadata={"help": "Factor of gamma, as LoRA's alpha / r."})
    atom_init_norm: float = field(default=1.0, metadata={"help": "Norm of the raw rows of atoms at the start."})
    frame_normalized: bool = field(default=True, metadata={"help": "Take the frame potential per pair of atoms."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.options()
        if self.bank_of is not None and (self.train_atoms_only or self.share_bank):
            raise ValueError(f"bank_of must be None for share_bank or train_atoms_only, got {self.bank_of!r}")
        if self.train_atoms_only and self.gamma_init == 0 and self.atom_counts is None:
            raise ValueError("gamma_init must not be 0 for train_atoms_only: nothing would be trained, got 0")
        for target, counts in (self.atom_counts or {}).items():
            several = len(self.atom_origins or [""])
            if len(counts) != 2 + several or not 0 <= counts[1] < counts[0] or counts[0] < self.top_k:
                raise ValueError(
                    f"atom_counts must be M >= top_k = {self.top_k}, 0 <= kept < M, and a number for each of {several} "
                    f"origins, got {counts} of {target!r}"
                )
        if self.atom_origins is not None and len(set(self.atom_origins)) != max(1, len(self.atom_origins)):
            raise ValueError(f"atom_origins must be one name or more, all different, got {self.atom_origins}")
        # A file holds a list.
        self.ngram_orders = self.context().ngram_orders

    @property
    def freezes_rest(self) -> bool:
        """Whether all but atoms and their rows of the router stay as they are."""
        keeps = any(counts[1] for counts in (self.atom_counts or {}).values())
        return self.train_atoms_only or (keeps and len(self.atom_origins or ()) > 1)

    def options(self) -> DSCOptions:
        """The options of the layers."""
        return DSCOptions(**{f.name: getattr(self, f.name) for f in fields(DSCOptions)})

    def context(self) -> ContextOptions:
        """The options of what the layers see of the tokens before."""
        names = [f.name for f in (*fields(DSCFields), *fields(ContextFields))]
        context, _ = split_context({name: getattr(self, name) for name in names})
        if context.router_context > 1 and context.router_input == "hidden":
            raise ValueError(
                "router_input must be 'embeddings' for router_context > 1 in an adapter, got 'hidden': its model's "
                "cache keeps no hidden states"
            )
        return context.beside(gate=False)


@dataclass
class MixtureOfLoRAsConfig(AdapterConfig):
    """A mixture of LoRA experts beside each target module; at rank 1, the ablation of DSC without its gate and norms.

    Args:
        num_experts: N.
        rank: r of each expert.
        top_k: Experts per token.
        scale: Constant factor of the update, LoRA's alpha / r.
        normalize_weights: Divide the selected softmax weights by their sum; by default if ``top_k > 1``. A single
            weight would always be 1 and give the router no gradient from the task: training with ``top_k=1`` and True
            raises, evaluation works.
        router_norm: LayerNorm before the router.
        aux_weight: Weight of the load balance.
        z_weight: Weight of the router z-loss.
        impl: Implementation of the composition.

    Raises:
        TypeError: If a field has another type.
        ValueError: On an option out of its range.
    """

    METHOD = "MIXTURE_OF_LORAS"

    num_experts: int = field(default=8, metadata={"help": "N."})
    rank: int = field(default=1, metadata={"help": "r of each expert."})
    top_k: int = field(default=2, metadata={"help": "Experts per token."})
    scale: float = field(default=2.0, metadata={"help": "Factor of the update, LoRA's alpha / r."})
    normalize_weights: bool | None = None
    router_norm: RouterNorm = "none"
    aux_weight: float = field(default=0.01, metadata={"help": "Weight of the load balance."})
    z_weight: float = field(default=1e-4, metadata={"help": "Weight of the router z-loss."})
    impl: Implementation = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, num_experts=self.num_experts, rank=self.rank, top_k=self.top_k)
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k must be at most num_experts = {self.num_experts}, got {self.top_k}")
        check_positive(scale=self.scale)
        RegularizerWeights(aux=self.aux_weight, z=self.z_weight)
        if self.normalize_weights is None:
            # Saved as a value, so that a later change of defaults does not change saved adapters.
            self.normalize_weights = self.top_k > 1

    def arguments(self) -> dict[str, Any]:
        """The arguments of :class:`torchdsc.baselines.MixtureOfLoRAs`."""
        own = {f.name for f in fields(MixtureOfLoRAsConfig)} - {f.name for f in fields(AdapterConfig)}
        return {name: getattr(self, name) for name in own}

"""Settings of a run: series, budget, feed-forward layer, model and schedule."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from torchdsc.kinds import FeedForwardKind
from torchdsc.lab.schema import Count, Model, Name, Rate, shorten

if TYPE_CHECKING:
    from torchdsc.lab.budget import Budget

__all__ = ["Attention", "Settings", "check_feed_forward_options"]

Attention = Literal["full", "causal"]
_Share = Annotated[float, Field(ge=0, lt=1)]


class Settings(Model):
    """A patch transformer with a feed-forward layer of one kind, and how it is trained to forecast."""

    method: FeedForwardKind = "dsc"
    """Kind of feed-forward layer."""
    feed_forward: dict[str, Any] = Field(default_factory=dict)
    """Further options of the layer; its widths are the budget solver's. Patches have no token embeddings or ids, so
    that contexts and n-grams are refused."""
    source: Name
    """File of the series (csv, tsv, jsonl, parquet): a column of dates, and columns of numbers without a gap, in the
    order of time."""
    date: Name = "date"
    """The column of dates, which are not read."""
    train_rows: Count = 8640
    """Rows to train on, the first: twelve months of 30 days by the hour, the standard split of ETTh1. What a column is
    standardised by is theirs."""
    valid_rows: Count = 2880
    """Rows after these whose forecasts choose and compare: four months."""
    test_rows: Count = 2880
    """Rows after these, looked at once at the end. Later rows are not used."""
    look_back: Count = 96
    """Rows that a forecast sees; those of the first forecasts of a part may be in the part before."""
    horizon: Count = 96
    """Rows that it says."""
    patch_length: Count = 16
    """Rows of a patch, the model's token."""
    stride: Count = 8
    """Rows from one patch to the next; patches must end where the look-back ends."""
    total: Rate = 96_640
    """Target of stored parameters of the model."""
    active: Rate = 72_064
    """Target of active parameters; all outside the feed-forward layers are."""
    match: FeedForwardKind | None = None
    """Method whose realised parameter counts, without further options, replace the targets for others."""
    d_model: Count = 32
    """Hidden size."""
    n_layer: Count = 3
    """Layers."""
    n_head: Count = 4
    """Attention heads."""
    attention: Attention = "full"
    """Of patches: "full", or "causal" to earlier ones alone."""
    dropout: _Share = 0.2
    """Of embedded patches, attention weights and residual branches."""
    residual_init: Literal["gpt2", "published", "none"] = "gpt2"
    """See DSCGPTConfig."""
    initializer_range: Rate = 0.02
    """Standard deviation of initial weights, see DSCGPTConfig."""
    top_k: Count = 4
    """K, atoms a patch composes; experts a patch takes for Mixture-of-LoRAs and PEER."""
    rank: Count = 1
    """Of Mixture-of-LoRAs."""
    experts_per_token: Count = 2
    """Of MoE."""
    steps: Count = 400
    """Optimizer steps."""
    batch_size: Count = 16
    """Windows of a step, each with all columns."""
    accumulation: Count = 1
    """Micro-batches that a step is cut into; must divide batch_size."""
    learning_rate: Rate = 4e-3
    """Peak of the cosine schedule."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Its end, as a share of the peak."""
    warmup_steps: Annotated[int, Field(ge=0)] = 40
    """Linear warm-up."""
    router_lr_multiplier: Rate = 1.0
    """Factor on routers' learning rate."""
    atom_lr_multiplier: Rate = 1.0
    """Factor on that of DSC's atoms."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.02
    """Of matrices; routers, positions, norms and gamma have none."""
    beta1: _Share = 0.9
    """Of AdamW."""
    beta2: _Share = 0.95
    """Of AdamW."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradient clipping."""
    eval_every: Count = 100
    """Steps between evaluations, and checkpoints."""
    eval_windows: Count | None = None
    """Validation windows, evenly spread; all by default, one beginning at each row."""
    test_windows: Count | None = None
    """Test windows, likewise."""
    eval_batch_size: Count = 64
    """Windows of an evaluation batch, and of the one that is timed."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of autocast in training; fp32 for none."""

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        check_feed_forward_options(self.feed_forward)
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation must divide batch_size = {self.batch_size}, got {self.accumulation}")
        if self.d_model % self.n_head:
            raise ValueError(f"n_head must divide d_model = {self.d_model}, got {self.n_head}")
        if self.patch_length > self.look_back:
            raise ValueError(f"patch_length must be at most look_back = {self.look_back}, got {self.patch_length}")
        if (self.look_back - self.patch_length) % self.stride:
            raise ValueError(
                f"stride must divide look_back - patch_length = {self.look_back - self.patch_length}, got {self.stride}"
            )
        if self.look_back + self.horizon > self.train_rows:
            raise ValueError(
                f"train_rows must be at least look_back + horizon = {self.look_back + self.horizon}, "
                f"got {self.train_rows}"
            )
        for name in ("valid_rows", "test_rows"):
            if getattr(self, name) < self.horizon:
                raise ValueError(f"{name} must be at least horizon = {self.horizon}, got {getattr(self, name)}")
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps must be in 0 .. steps = {self.steps}, got {self.warmup_steps}")
        return self

    @property
    def data_key(self) -> tuple[object, ...]:
        """The settings that its standardised series depend on."""
        rows = self.train_rows, self.valid_rows, self.test_rows
        return self.source, self.date, rows, self.look_back, self.horizon

    @property
    def n_patches(self) -> int:
        """Patches of a look-back P."""
        return (self.look_back - self.patch_length) // self.stride + 1

    @property
    def budget(self) -> "Budget":
        """The budget of the solver; embedding of patches, positions and head are outside the blocks."""
        from torchdsc.lab.budget import Budget

        embedding = (self.patch_length + self.n_patches) * self.d_model
        head = (self.n_patches * self.d_model + 1) * self.horizon
        return Budget(self.total, self.active, self.d_model, self.n_layer, outside=embedding + head)


def check_feed_forward_options(options: Mapping[str, Any]) -> None:
    """Refuse options of a feed-forward layer that need token embeddings or ids, or concern several layers.

    Raises:
        ValueError: If there is one; it names it.
    """
    if not options:
        return
    from torchdsc.baselines.methods import METHODS

    # Of the model around its layers: what sees token embeddings or ids, or what layers share. A static layer is a part.
    around = frozenset().union(*(method.model_options for method in METHODS.values())) - {"static"}
    for name, value in options.items():
        if name in around or (name, value) == ("router", "ngram"):
            raise ValueError(
                f"feed_forward must be options of a layer that sees its own input alone, as patches have no token "
                f"embeddings or ids, got {name} = {shorten(value)}"
            )

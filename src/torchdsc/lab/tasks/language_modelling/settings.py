"""Settings of a run: corpus, budget, feed-forward layer, model and schedule."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from torchdsc.kinds import FeedForwardKind, OptimizerKind
from torchdsc.lab.schema import Count, Model, Name, Rate

if TYPE_CHECKING:
    from torchdsc.lab.budget import Budget

__all__ = ["Settings"]


_Share = Annotated[float, Field(ge=0, lt=1)]


class Settings(Model):
    """A language model with a feed-forward layer of one kind, and how it is trained."""

    method: FeedForwardKind = "dsc"
    """Kind of feed-forward layer."""
    feed_forward: dict[str, Any] = Field(default_factory=dict)
    """Further options of the layer; its widths are the budget solver's."""
    corpus: Name = "embedded"
    """"embedded" (the Python standard library), "wikitext-2", "wikitext-103", or a path to text."""
    preparation: Literal["plain", "published"] = "plain"
    """"published" for the text preparation of the paper's published run."""
    max_bytes: Count | None = None
    """Bytes of each split to use at most."""
    tokenizer: Name = "bpe"
    """"bpe" (trained on the training part), "bytes", "gpt2", or a folder or hub id."""
    # Sixty times the largest vocabularies in use.
    vocab_size: Annotated[int, Field(ge=1, le=2**24)] = 4096
    """Of a trained BPE."""
    total: Rate = 1_696_000
    """Target of stored parameters of the model."""
    active: Rate = 1_178_900
    """Target of active parameters."""
    match: FeedForwardKind | None = None
    """Method whose realised parameter counts, without further options, replace the targets for others."""
    d_model: Count = 128
    """Hidden size."""
    n_layer: Count = 4
    """Layers."""
    n_head: Count = 4
    """Attention heads."""
    window: Count = 128
    """Tokens of a training sequence T."""
    order: Literal["random", "once"] = "random"
    """Of training windows: at random places, or side by side in random order, so that no token is seen twice."""
    dropout: _Share = 0.0
    """Of the model."""
    residual_init: Literal["gpt2", "published", "none"] = "gpt2"
    """See DSCGPTConfig."""
    initializer_range: Rate = 0.02
    """Standard deviation of initial weights, see DSCGPTConfig."""
    top_k: Count = 4
    """K, atoms a token composes; experts a token takes for Mixture-of-LoRAs and PEER."""
    rank: Count = 1
    """Of Mixture-of-LoRAs."""
    experts_per_token: Count = 2
    """Of MoE."""
    steps: Count = 400
    """Optimizer steps."""
    batch_size: Count = 16
    """Sequences of a step."""
    accumulation: Count = 1
    """Micro-batches that a step is cut into; must divide batch_size."""
    learning_rate: Rate = 4e-3
    """Peak of the cosine schedule."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Its end, as a share of the peak."""
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    """Linear warm-up."""
    router_lr_multiplier: Rate = 5.0
    """Factor on routers' learning rate."""
    atom_lr_multiplier: Rate = 1.0
    """Factor on that of DSC's atoms."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.02
    """Of matrices; routers, embeddings, norms and gamma have none."""
    optimizer: OptimizerKind = "adamw"
    """"muon" for Muon on matrices of attention and feed-forward layers, AdamW on the rest; see build_optimizer."""
    muon_learning_rate: Rate = 0.02
    """Peak of the schedule for Muon's matrices."""
    beta1: _Share = 0.9
    """Of AdamW."""
    beta2: _Share = 0.95
    """Of AdamW."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradient clipping."""
    eval_every: Count = 100
    """Steps between evaluations, and checkpoints."""
    eval_windows: Count = 64
    """Validation windows."""
    test_windows: Count = 128
    """Test windows, looked at once at the end."""
    eval_batch_size: Count = 16
    """Sequences of an evaluation batch, and of the one that is timed."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of autocast in training; fp32 for none."""
    compile: bool = False
    """Whether to train through torch.compile."""

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation must divide batch_size = {self.batch_size}, got {self.accumulation}")
        if self.d_model % self.n_head:
            raise ValueError(f"n_head must divide d_model = {self.d_model}, got {self.n_head}")
        return self

    @property
    def data_key(self) -> tuple[object, ...]:
        """The settings that its tokens depend on."""
        return self.corpus, self.preparation, self.max_bytes, self.tokenizer, self.vocab_size, self.window

    def budget(self, vocab_size: int) -> "Budget":
        """The budget of the solver, for a vocabulary of ``vocab_size`` tokens."""
        from torchdsc.lab.budget import Budget

        return Budget(self.total, self.active, self.d_model, self.n_layer, vocab_size, self.window)

    def doubts(self) -> list[str]:
        """Warnings, as sentences, about settings that are allowed but hardly intended."""
        found = []
        if self.warmup_steps >= self.steps:
            found.append(f"warmup_steps = {self.warmup_steps:,} of {self.steps:,} steps: no step has the full rate")
        # AdamW moves a weight by about the rate each step.
        if self.learning_rate > 0.1:
            found.append(f"learning_rate = {self.learning_rate:g}: weights begin at about 0.02, and 0.01 is high")
        return found

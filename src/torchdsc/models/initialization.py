"""Initial weights of DSCGPT."""

from torch import nn
from transformers import initialization as init

from torchdsc.baselines import SoftmaxRouter
from torchdsc.baselines.moe import Experts
from torchdsc.nn import DSC, BasisBank, RoutedLayer, Router, ShortConvolution
from torchdsc.nn.dsc import Projection
from torchdsc.nn.routers.query_norm import QueryBatchNorm

from .configuration import DSCGPTConfig


def initialize(module: nn.Module, config: DSCGPTConfig) -> None:
    """Initialise the parameters that ``module`` itself owns and that were not loaded from a checkpoint.

    Weights are normal with standard deviation ``initializer_range``, or less as ``residual_init`` says. LayerNorms
    start as the identity. Atoms, routers, short convolutions, gamma and LoRA factors start as their own modules define.

    Args:
        module: Any module of the model.
        config: The model's configuration.
    """
    std = config.initializer_range
    residual_std = std if config.residual_init == "none" else std / (2 * config.num_hidden_layers) ** 0.5
    if isinstance(module, Projection):
        module.reset_parameters()
    elif isinstance(module, nn.Linear | nn.Embedding):
        small = getattr(module, "_writes_residual", None)
        into_residual = small == "always" or (small == "feed_forward" and config.residual_init == "gpt2")
        init.normal_(module.weight, std=residual_std if into_residual else std)
    elif isinstance(module, Experts):
        init.normal_(module.first, std=std)
        init.normal_(module.down_proj, std=residual_std)
    elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
        init.ones_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, Router):
        for parameter, deviation in module.deviations(std if module.init_std is None else module.init_std):
            init.normal_(parameter, std=deviation)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, QueryBatchNorm):
        for ones, zeros in ((module.weight, module.bias), (module.running_variance, module.running_mean)):
            init.ones_(ones)
            init.zeros_(zeros)
    elif isinstance(module, SoftmaxRouter) and module.balancing == "bias":
        init.zeros_(module.moves)
        init.zeros_(module.load)
    elif isinstance(module, BasisBank):
        fresh = BasisBank(module.num_atoms, module.in_features, module.out_features, init_norm=module.init_norm)
        init.copy_(module.u, fresh.u)
        init.copy_(module.v, fresh.v)
    elif isinstance(module, ShortConvolution):
        started = ShortConvolution(module.weight.shape[1], module.num_tokens, own=module.own, earlier=module.earlier)
        init.copy_(module.weight, started.weight)
    elif isinstance(module, DSC):
        init.constant_(module.gamma, module.options.gamma_init)
    elif isinstance(module, RoutedLayer) and hasattr(module, "reset_parameters"):
        # During transformers' initialisation, torch's init functions skip what was loaded from a checkpoint.
        module.reset_parameters()  # type: ignore[operator]


def mark_residual_writers(block: nn.Module) -> None:
    """Mark the linear layers of a block that write into the residual stream."""
    for name, module in block.named_modules():
        if name == "attention.out_proj":
            module._writes_residual = "always"
        elif name in ("feed_forward.down", "feed_forward.base.down", "feed_forward.shared.down", "ngram_tables.value"):
            module._writes_residual = "feed_forward"

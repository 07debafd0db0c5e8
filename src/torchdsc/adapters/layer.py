"""A target module with its adapters: ``base(x) + update(x)``."""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchdsc.baselines import MixtureOfLoRAs
from torchdsc.nn import RoutedLayer
from torchdsc.nn.broadcast import Broadcast, Listener
from torchdsc.nn.host import TokenMasked, feature_sizes, is_linear, stream_width

from .config import AdapterConfig, MixtureOfLoRAsConfig

# PEFT's name for no adapter, for samples of a mixed batch.
BASE = "__base__"


def sizes_of(config: AdapterConfig, model: nn.Module, name: str) -> tuple[int, int]:
    """d_in and d_out of a target module.

    Args:
        config: The adapter's configuration; sizes given there are used for targets that are not linear layers.
        model: The model around the module.
        name: Name of the module in it.

    Raises:
        TypeError: If the module contains no linear layer, or is a list of modules or a whole model.
        ValueError: If its sizes cannot be found.
    """
    module = model.get_submodule(name)
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(base, PreTrainedModel | nn.ModuleList | nn.ModuleDict):
        raise TypeError(
            f"target_modules must match modules that map tokens (..., d_in) to (..., d_out), got {name!r}, a "
            f"{type(base).__name__}"
        )
    first, last = config.in_features, config.out_features
    if first is None or last is None or is_linear(base):
        first, last = feature_sizes(base, name, stream_width(model, name))
    if first is None or last is None:
        raise TypeError(
            f"target_modules must match linear layers, Conv1D or modules that hold some, got {name!r}, a "
            f"{type(base).__name__}"
        )
    return first, last


def trains(layer: nn.Module) -> bool:
    """Whether an adapter's router, or all of it if that has no parameters, is trained: then regularisers make sense."""
    routed = [*cast(RoutedLayer, layer).router.parameters()] or [*layer.parameters()]
    return any(parameter.requires_grad for parameter in routed)


class AdapterLayer(nn.Module, BaseTunerLayer, TokenMasked):
    """A target module and a routed layer for each of its adapters, which subclasses build.

    The updates are added in a forward hook of the target module. It runs before other hooks, so that transformers,
    which records hidden states in hooks, sees the adapted output. Attributes that the adapter layer does not have are
    looked up in the target module.

    Args:
        base_layer: The module to adapt. It maps (..., d_in) to (..., d_out), or to a tuple whose first element is that.
        name: Name of the module, for errors.
        in_features: d_in.
        out_features: d_out.
    """

    # Name of the attribute that holds the adapters; it begins with PEFT's prefix of the method.
    container: ClassVar[str]

    # Attributes of PEFT's mixin, for type checkers.
    base_layer: nn.Module
    in_features: int
    out_features: int
    active_adapters: list[str]
    disable_adapters: bool
    get_base_layer: Callable[[], nn.Module]
    set_adapter: Callable[..., None]
    set_requires_grad: Callable[..., None]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]
    _cast_input_dtype: Callable[[Tensor, torch.dtype], Tensor]

    def __init__(self, base_layer: nn.Module, name: str, in_features: int, out_features: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        setattr(self, self.container, nn.ModuleDict())
        self.target = name
        self.in_features, self.out_features = in_features, out_features
        self._sample_names: list[str] | None = None
        self._handle = self._host().register_forward_hook(self._add_updates, prepend=True, with_kwargs=True)

    def __getattr__(self, name: str) -> Any:
        """Look an attribute that the adapter layer does not have up in the target module."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Not private attributes of the instance, which other libraries set, such as accelerate's hook.
            if name == "base_layer" or name.startswith("__"):
                raise
            host = self._host()
            if name.startswith("_") and not hasattr(type(host), name):
                raise
            return getattr(host, name)

    def _host(self) -> nn.Module:
        """The target module itself, also if adapters of another method of this package are around it."""
        host = self.base_layer
        while isinstance(host, AdapterLayer):
            host = host.base_layer
        return host

    def leave(self) -> None:
        """Remove all hooks from the target module and the model around it."""
        self._handle.remove()
        for name in self.adapters:
            self._silence(name)

    def keep_frozen(self) -> None:
        """Let no gradient reach what is kept as it is, whatever PEFT lets be trained."""

    def listen(self, adapter_name: str, broadcast: Broadcast) -> None:
        """Let an adapter of this layer, if it has that one, get its model's tokens."""
        if adapter_name in self.adapters:
            self._silence(adapter_name)
            cast(Listener, self.adapters[adapter_name]).listen(broadcast)

    def _silence(self, adapter_name: str) -> None:
        layer = self.adapters[adapter_name]
        if isinstance(layer, Listener):
            layer.leave()

    def delete_adapter(self, adapter_name: str) -> None:
        """See PEFT."""
        if adapter_name in self.adapters:
            self._silence(adapter_name)
        super().delete_adapter(adapter_name)

    @property
    def adapters(self) -> nn.ModuleDict:
        """The adapters by name."""
        container: nn.ModuleDict = getattr(self, self.container)
        return container

    def update_layer(
        self, adapter_name: str, config: AdapterConfig, owner: "AdapterLayer | None", **kwargs: Any
    ) -> None:
        """Add an adapter.

        Args:
            adapter_name: Its name.
            config: Its configuration.
            owner: The first layer of the same sizes, whose bank and router may be shared; None for that layer itself.
            **kwargs: ``inference_mode`` of PEFT.

        Raises:
            ValueError: If bank or router would be shared with a layer on another device.
        """
        layer = self.build(config, None if owner is None else owner.adapters[adapter_name])
        self.adapters[adapter_name] = layer.train(self.training)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        devices = {part.device for part in self.adapters[adapter_name].parameters()} - {torch.device("meta")}
        if len(devices) > 1:
            raise ValueError(f"shared banks and routers must be on the device of every target module, got {devices}")
        self.set_adapter(self.active_adapters, inference_mode=kwargs.get("inference_mode", False))

    def parameters_of(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """Parameters of an adapter; none if the layer does not have it."""
        if adapter_name in self.adapters:
            yield from self.adapters[adapter_name].parameters()

    def build(self, config: AdapterConfig, owner: nn.Module | None) -> RoutedLayer:
        """Build the routed layer of a new adapter, which may share parts of ``owner``."""
        raise NotImplementedError

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The module's output plus the updates of the active adapters.

        Args:
            *args: Arguments of the module; the first is its input of shape (..., d_in).
            adapter_names: Name of the adapter for each sample of a mixed batch, instead of the active ones.
            **kwargs: Arguments of the module.

        Raises:
            ValueError: If sizes given in the config are not those of the module's input and output.
        """
        if adapter_names is None:
            return self.base_layer(*args, **kwargs)
        self._sample_names = adapter_names
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            self._sample_names = None

    def _add_updates(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.disable_adapters:
            return output
        x = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
        y: Tensor = output[0] if isinstance(output, tuple) else output
        if self._sample_names is None:
            for name in self.active_adapters:
                if name in self.adapters:
                    y = y + self._update(name, x, y, self.mask_of(x))
        else:
            y = self._mixed(x, y, self._sample_names)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def _update(self, name: str, x: Tensor, y: Tensor, mask: Tensor | None, rows: Tensor | None = None) -> Tensor:
        layer = cast(RoutedLayer, self.adapters[name])
        x, routed = self._cast_input_dtype(x, next(layer.parameters()).dtype), None
        if isinstance(layer, Listener):
            x, routed, _ = layer.look(x, rows)
        if self.training and not trains(layer):
            # A frozen adapter has no regularisers to collect.
            routing, _ = layer.route(x if routed is None else routed, mask).take_statistics()
            update: Tensor = layer(x, mask, routing=routing)
        else:
            update = layer(x, mask, routed)
        if update.shape != y.shape:
            raise ValueError(
                f"in_features and out_features must be those of {self.target!r}, got ({self.in_features}, "
                f"{self.out_features}) for {tuple(x.shape)} mapped to {tuple(y.shape)}"
            )
        if isinstance(layer, Listener):
            layer.kept(update)
        return update.to(y.dtype)

    def _mixed(self, x: Tensor, y: Tensor, names: list[str]) -> Tensor:
        y = y.clone()
        for name in dict.fromkeys(names):
            if name in self.adapters:
                rows = torch.tensor([i for i, other in enumerate(names) if other == name], device=x.device)
                y[rows] += self._update(name, x[rows], y[rows], None, rows)
        return y

    def active_layers(self) -> Iterator[RoutedLayer]:
        """The routed layers that a forward pass runs."""
        if not self.disable_adapters:
            yield from (
                cast(RoutedLayer, self.adapters[name]) for name in self.active_adapters if name in self.adapters
            )

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        # PEFT's method looks at the module's weight, which a whole MLP does not have.
        for module in base_layer.modules():
            device, dtype = BaseTunerLayer._get_base_layer_device_and_dtype(self, module)
            if device is not None:
                return device, dtype
        return None, None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: see :data:`NO_MERGE`."""
        raise ValueError(NO_MERGE)

    def unmerge(self) -> None:
        """Does nothing, as nothing is ever merged."""

    def __repr__(self) -> str:
        return "torchdsc." + super().__repr__()


NO_MERGE = (
    "adapters whose weights are composed token by token cannot be merged into a weight: there is no single update to "
    "add to it. Keep them beside the model, or unload() them"
)


class MixtureOfLoRAsLayer(AdapterLayer):
    """A target module with a :class:`torchdsc.baselines.MixtureOfLoRAs` for each adapter."""

    container = "molora_layers"
    adapter_layer_names = ("molora_layers",)

    def build(self, config: AdapterConfig, owner: nn.Module | None) -> MixtureOfLoRAs:
        """See :class:`AdapterLayer`."""
        assert isinstance(config, MixtureOfLoRAsConfig)
        return MixtureOfLoRAs(self.in_features, self.out_features, **config.arguments())

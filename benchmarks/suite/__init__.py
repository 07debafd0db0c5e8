"""The registered benchmarks, each in a file that states what is compared and nothing else.

They are imported by name: against an older library one of them may fail to, and the others still run.
"""

from importlib import import_module

from benchmarks.case import Benchmark

# In the order in which they run and stand on the page.
_REGISTERED = {
    "layer": "layer:LAYER",
    "layer_sweep": "layer:LAYER_SWEEP",
    "recommended": "recommended:RECOMMENDED",
    "routers": "routers:ROUTERS_BENCHMARK",
    "traffic": "traffic:TRAFFIC",
    "ahead": "ahead:AHEAD",
    "model": "model:MODEL",
    "sparse": "presets:SPARSE",
    "sparse_ratios": "presets:SPARSE_RATIOS",
    "ablations": "presets:ABLATIONS",
    "adapters": "adapters:ADAPTERS",
    "diagnostics": "diagnostics:DIAGNOSTICS",
    "memory": "memory:MEMORY",
    "compose": "compose:COMPOSE",
    "select": "select:SELECT",
    "compiled": "compiled:COMPILED_BENCHMARK",
    "crossover": "crossover:CROSSOVER",
}
NAMES = tuple(_REGISTERED)
# What writes their page.
PAGE = "page"


def check_name(name: str) -> None:
    """Raise ``ValueError`` if there is no benchmark of that name; imports none."""
    if name not in _REGISTERED:
        raise ValueError(f"names must be among {', '.join(NAMES)}, got {name!r}")


def load(name: str) -> Benchmark:
    """A benchmark by name.

    Raises:
        ValueError: If there is none of that name.
    """
    check_name(name)
    module, _, attribute = _REGISTERED[name].partition(":")
    benchmark: Benchmark = getattr(import_module(f"{__name__}.{module}"), attribute)
    return benchmark

"""``torchdsc budget``."""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, get_args

from torchdsc.kinds import RouterKind

from .parsing import ArgumentParser

if TYPE_CHECKING:
    from rich.table import Table

    from torchdsc.lab.budget import Plan


def run(arguments: list[str]) -> int:
    """Print the widths of all four methods for a budget."""
    parser = ArgumentParser("budget", "Solve each method's widths for total and active parameters.")
    parser.add_argument("--total", type=float, required=True, help="stored parameters of the model")
    parser.add_argument("--active", type=float, required=True, help="parameters that one token uses")
    parser.add_argument("--d_model", type=int, required=True, help="hidden size D")
    parser.add_argument("--n_layer", type=int, required=True, help="layers")
    parser.add_argument("--vocab_size", type=int, default=50304, help="tokens of the tied embedding (default: 50304)")
    parser.add_argument("--n_positions", type=int, default=256, help="learned positions (default: 256)")
    parser.add_argument("--top_k", type=int, help="K of DSC, and experts per token of Mixture-of-LoRAs (default: 4)")
    parser.add_argument("--rank", type=int, default=1, help="of Mixture-of-LoRAs")
    parser.add_argument("--experts_per_token", type=int, default=2, help="of MoE")
    parser.add_argument(
        "--router",
        choices=get_args(RouterKind),
        metavar="KIND",
        help="of DSC: linear (default), low_rank, product_key or ngram",
    )
    parser.add_argument("--router_rank", type=int, help="of a low_rank or product_key router")
    parser.add_argument("--router_heads", type=int, help="of a product_key router (default: 1)")
    parser.add_argument(
        "--recommended",
        choices=("embeddings", "ngrams"),
        help="DSC as recommended, routed by these, in place of the paper's; see torchdsc.recommended",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    from rich.console import Console

    from torchdsc.lab.budget import Budget, solve_all
    from torchdsc.nn import recommended

    sizes = ("total", "active", "d_model", "n_layer", "vocab_size", "n_positions")
    budget = Budget(**{name: getattr(options, name) for name in sizes})
    names = ("router", "router_rank", "router_heads")
    # None is dropped in silence: what does not fit the router is refused.
    router = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.recommended is None:
        dsc_options = router
    elif router or options.top_k is not None:
        parser.error("--recommended must be given without --top_k and options of the router, which it settles")
    else:
        dsc_options = dict(recommended(options.recommended))
    refused: dict[str, str] = {}
    plans = solve_all(
        budget,
        top_k=4 if options.top_k is None else options.top_k,
        rank=options.rank,
        experts_per_token=options.experts_per_token,
        dsc_options=dsc_options,
        refused=refused,
    )
    if options.json:
        print(json.dumps([asdict(plan) for plan in plans], indent=1))
    else:
        Console().print(_table(plans))
    for method, reason in refused.items():
        print(f"torchdsc budget: no {method}: {reason}", file=sys.stderr)
    return 0


def _table(plans: "list[Plan]") -> "Table":
    from rich.table import Table

    table = Table("method", "widths", caption="miss: realised feed-forward parameters against the target")
    for heading in ("total M", "miss", "active M", "miss"):
        table.add_column(heading, justify="right")
    for plan in plans:
        miss_active = "" if plan.miss_active is None else f"{plan.miss_active:+.2%}"
        table.add_row(
            plan.method,
            plan.description,
            f"{plan.params_total / 1e6:.3f}",
            f"{plan.miss_total:+.2%}",
            f"{plan.params_active / 1e6:.3f}",
            miss_active,
        )
    return table

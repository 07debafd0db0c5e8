"""Two gloo processes under DistributedDataParallel, with unequal tokens and padding, against one process."""

import os
import sys

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from torchdsc import DSC, Residual, regularization, synchronize_regularization
from torchdsc.baselines import DenseFFN

ONLY = {"aux_weight": 0.0, "budget_weight": 0.0, "frame_weight": 0.0, "z_weight": 0.0}
# Tokens and padding of each process: 20 counted of 23, and 9 of 9.
PARTS = [(20, 3), (9, 0)]
TOKENS = 29


def make_model(terms):
    torch.manual_seed(3)
    options = ONLY | {f"{term}_weight": 0.5 for term in terms}
    model = Residual(DenseFFN(6, 8), DSC(6, num_atoms=14, top_k=3, budget=5.0, **options)).double()
    torch.nn.init.normal_(model.dsc.router.weight, std=0.5)
    return model


def make_parts():
    generator = torch.Generator().manual_seed(4)
    parts = []
    for counted, padding in PARTS:
        x = torch.randn(counted + padding, 6, dtype=torch.float64, generator=generator)
        parts.append((x, torch.arange(counted + padding) < counted))
    return parts


def work(rank, port_file, terms, synchronize, results):
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=2)
    model = DistributedDataParallel(make_model(terms))
    x, mask = make_parts()[rank]
    y = model(x, token_mask=mask)
    task = (y.square().sum(-1) * mask).sum() / TOKENS
    if synchronize == "marked":
        synchronize_regularization(model)
    total = task + regularization(model, num_tokens=TOKENS, synchronize=synchronize == "asked").total
    (total * 2).backward()
    if rank == 0:
        torch.save([p.grad for p in model.parameters()], results)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("terms", "synchronize"),
    [(("z", "frame"), ""), (("aux", "budget"), "asked"), (("aux", "budget"), "marked"), (("aux", "budget"), "")],
)
def test_two_processes_equal_one(terms, synchronize, tmp_path, run_processes):
    results = tmp_path / "gradients.pt"
    run_processes(2, __file__, tmp_path / "rendezvous", ",".join(terms), synchronize, results)
    actual = torch.load(results, weights_only=True)
    model = make_model(terms)
    parts = make_parts()
    whole = torch.cat([x[mask] for x, mask in parts])
    loss = model(whole).square().sum() / TOKENS
    if synchronize or "z" in terms:
        loss = loss + regularization(model).total
    else:
        model.dsc.statistics_log.take()
        for x, mask in parts:
            _y = model(x[mask])
            loss = loss + regularization(model).total * mask.sum() / TOKENS
    loss.backward()
    for a, parameter in zip(actual, model.parameters(), strict=True):
        assert (a - parameter.grad).abs().max() <= 1e-12 * parameter.grad.abs().max().clamp_min(1e-3)


if __name__ == "__main__":
    rendezvous, names, flag, output, own_rank = sys.argv[1:]
    work(int(own_rank), rendezvous, tuple(names.split(",")), flag, output)
    # Torch may abort on leaving the interpreter while a thread of the group is still ending.
    os._exit(0)

"""A bank over three gloo processes equals the whole bank on all their tokens."""

import os
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from torchdsc import DSC, BasisBank, Residual, build_optimizer, recommended, regularization
from torchdsc.models import DSCGPTConfig, DSCGPTForCausalLM
from torchdsc.nn import bank_shards, shard_bank
from torchdsc.optim import clip_grad_norm

# Three processes share 8 features unevenly: 3, 3 and 2.
PROCESSES, WIDTH, OUT, TOP_K = 3, 8, 7, 3
SHARES = {"uneven": (5, 2, 4), "none for one": (4, 0, 3)}
# Terms that are linear in tokens, or independent of them.
WEIGHTS = {"aux_weight": 0.0, "budget_weight": 0.0, "z_weight": 0.5, "frame_weight": 0.5}


def make(init_norm=1.0, num_atoms=14, dtype=torch.float64, **options):
    torch.manual_seed(3)
    bank = BasisBank(num_atoms, WIDTH, OUT, init_norm=init_norm)
    options = {"num_atoms": num_atoms, "top_k": TOP_K, **WEIGHTS, **options}
    layers = [DSC(WIDTH, OUT, bank=bank, **options) for _ in range(2)]
    with torch.no_grad():
        # Norms that differ.
        bank.u.mul_(torch.linspace(0.5, 2, num_atoms).unsqueeze(1))
    first = Residual(nn.Linear(WIDTH, OUT), layers[0])
    return nn.Sequential(first, nn.Linear(OUT, WIDTH), layers[1]).to(dtype).train(), bank


CASES = {
    "default": make,
    "relu": partial(make, activation="relu"),
    "below eps": partial(make, init_norm=1e-3, eps=2e-3),
    "product keys": partial(make, num_atoms=16, router="product_key", router_rank=4),
    "frame of drawn atoms": partial(make, frame_samples=14, frame_normalized=True),
    "bfloat16": partial(make, dtype=torch.bfloat16),
}


def loss_of(model, tokens, total):
    return model(tokens).square().sum() / total + regularization(model, num_tokens=total).total


def tokens_of(shares, model):
    tokens = torch.randn(sum(shares), WIDTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return tokens.to(model[1].weight.dtype)


def shard(model, bank, mesh):
    shard_bank(bank, mesh)
    for module in (*model, model):
        fully_shard(module, mesh=mesh, ignored_params={bank.u, bank.v})


def gradients_of(case, shares, rank, mesh):
    model, bank = CASES[case]()
    shard(model, bank, mesh)
    mine = tokens_of(shares, model).split(list(shares))[rank]
    loss = loss_of(model, mine, sum(shares)) * PROCESSES
    loss.backward()
    assert bank.u.grad.to_local().shape == (bank.num_atoms, (3, 3, 2)[rank])
    return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


def trained(rank, mesh, folder):
    """Three steps of an optimizer, clipped; the whole state, which a whole model takes."""
    model, bank = make()
    shard(model, bank, mesh)
    optimizer = build_optimizer(model, learning_rate=1e-2, weight_decay=0.1, atom_lr_multiplier=4)
    for _ in range(3):
        optimizer.zero_grad()
        shares = SHARES["uneven"]
        (loss_of(model, tokens_of(shares, model).split(list(shares))[rank], sum(shares)) * PROCESSES).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5).full_tensor()
        optimizer.step()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=False))
    dcp.save(get_model_state_dict(model), checkpoint_id=f"{folder}/checkpoint")
    other, other_bank = make(init_norm=0.5)
    shard(other, other_bank, mesh)
    saved = get_model_state_dict(other)
    dcp.load(saved, checkpoint_id=f"{folder}/checkpoint")
    set_model_state_dict(other, saved)
    torch.testing.assert_close(other_bank.v.full_tensor(), bank.v.full_tensor())
    return {"state": state, "norm": norm}


def clipped(rank, mesh):
    """The norm of all gradients where the bank alone is sharded, and that of the bank's afterwards."""
    model, bank = make()
    shard_bank(bank, mesh)
    tokens = tokens_of((4, 4, 4), model).split(4)[rank]
    (loss_of(model, tokens, 12) * PROCESSES).backward()
    for parameter in model.parameters():
        if parameter is not bank.u and parameter is not bank.v:
            dist.all_reduce(parameter.grad.div_(PROCESSES))
    norm = clip_grad_norm(model.parameters(), 0.01)
    return {"norm": norm, "u": bank.u.grad.full_tensor(), "gamma": model[2].gamma.grad}


def make_language_model():
    """Addressed by n-grams, its two blocks over one bank."""
    options = {**recommended("ngrams", num_atoms=30, top_k=6), "share_bank": True}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    torch.manual_seed(3)
    model = DSCGPTForCausalLM(
        DSCGPTConfig(vocab_size=19, dropout=0.0, initializer_range=0.3, feed_forward_options=options, **sizes)
    ).double()
    [bank] = {module for module in model.modules() if isinstance(module, BasisBank)}
    return model.train(), bank


def sequences():
    return torch.randint(19, (5, 9), generator=torch.Generator().manual_seed(6))


def language_model(rank, mesh):
    """Gradients where the processes have two sequences, two and one."""
    model, bank = make_language_model()
    shard_bank(bank, mesh)
    for block in (*model.model.blocks, model):
        fully_shard(block, mesh=mesh, ignored_params={bank.u, bank.v})
    ids = sequences()
    mine = ids.split([2, 2, 1])[rank]
    (model(mine, labels=mine, num_items_in_batch=ids[:, 1:].numel()).loss * PROCESSES).backward()
    return {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}


def moved(rank, mesh):
    """Numbers that this process sends to others in a forward pass."""
    model, bank = make(frame_weight=0.0)
    shard_bank(bank, mesh)
    layer, sent = model[2], []
    exchange = bank_shards._Step.exchange

    def count(step, values, sizes, received):
        sent.append(sum(size for other, size in enumerate(sizes) if other != rank))
        return exchange(step, values, sizes, received)

    bank_shards._Step.exchange = count
    try:
        layer(torch.randn(6, WIDTH, dtype=torch.float64))
    finally:
        bank_shards._Step.exchange = exchange
    return sum(sent)


def made_in_parts(mesh):
    with torch.device("meta"):
        bank = BasisBank(5000, WIDTH, OUT, init_norm=0.3)
    shard_bank(bank, mesh)
    first = bank.u.full_tensor().clone()
    bank.reset_parameters()
    return [first, bank.u.full_tensor(), bank.v.full_tensor()]


def errors(mesh):
    found = {}

    def record(name, call):
        try:
            call()
        except (TypeError, ValueError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"

    model, bank = make()
    shard_bank(bank, mesh)
    record("twice", lambda: shard_bank(bank, mesh))
    record("type", lambda: shard_bank(model[2], mesh))
    tokens, indices, coefficients = torch.randn(2, WIDTH), torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3)
    record("x", lambda: bank(tokens[:, 1:], indices, coefficients))
    record("coefficients", lambda: bank(tokens, indices, coefficients[:, :1]))
    record("indices", lambda: bank(tokens, indices[:1]))
    record("sparse", lambda: shard_bank(BasisBank(4, 8, sparse_gradients=True), mesh))
    record("narrow", lambda: shard_bank(BasisBank(4, 8, 4), mesh))
    record("mesh", lambda: shard_bank(BasisBank(4, 8), init_device_mesh("cpu", (1, PROCESSES))))
    record("replicated", lambda: DistributedDataParallel(model))
    model, bank = make()
    shard_bank(bank, mesh)
    record("sharded again", lambda: fully_shard(model, mesh=mesh))
    return found


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    gradients = {
        (case, name): gradients_of(case, shares, rank, mesh) for case in CASES for name, shares in SHARES.items()
    }
    found = {"gradients": gradients, "trained": trained(rank, mesh, folder), "moved": moved(rank, mesh)}
    found["clipped"], found["language model"] = clipped(rank, mesh), language_model(rank, mesh)
    found |= {"made": made_in_parts(mesh), "errors": errors(mesh)}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory, run_processes):
    """What the processes found, all in one start of them."""
    folder = tmp_path_factory.mktemp("bank")
    run_processes(PROCESSES, __file__, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.mark.slow
@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_whole_bank(case, shares, results):
    model, _ = CASES[case]()
    loss_of(model, tokens_of(SHARES[shares], model), sum(SHARES[shares])).backward()
    precision = 0.05 if case == "bfloat16" else 1e-10
    for found in results:
        for name, parameter in model.named_parameters():
            actual, expected = found["gradients"][case, shares][name], parameter.grad
            assert expected.abs().max() > 0, name
            assert (actual - expected).abs().max() <= precision * expected.abs().max(), name


@pytest.mark.slow
def test_a_language_model_over_one_bank(results):
    model, _ = make_language_model()
    ids = sequences()
    model(ids, labels=ids, num_items_in_batch=ids[:, 1:].numel()).loss.backward()
    for found in results:
        for name, parameter in model.named_parameters():
            actual, expected = found["language model"][name], parameter.grad
            assert expected.abs().max() > 0, name
            # The loss of transformers is in float32.
            assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max(), name


@pytest.mark.slow
def test_steps_clipping_and_checkpoints(results):
    model, _ = make()
    optimizer = build_optimizer(model, learning_rate=1e-2, weight_decay=0.1, atom_lr_multiplier=4)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, tokens_of(SHARES["uneven"], model), sum(SHARES["uneven"])).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    for found in results:
        torch.testing.assert_close(found["trained"]["norm"], norm)
        torch.testing.assert_close(found["trained"]["state"], dict(model.state_dict()))


@pytest.mark.slow
def test_clipping_beside_parameters_that_are_not_sharded(results):
    model, bank = make()
    loss_of(model, tokens_of((4, 4, 4), model), 12).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    expected = {"norm": norm, "u": bank.u.grad, "gamma": model[2].gamma.grad}
    for found in results:
        torch.testing.assert_close(found["clipped"], expected)


@pytest.mark.slow
def test_what_moves_for_a_token(results):
    """x and y once, three numbers an atom to each other process, and the norms of the atoms in use."""
    others = PROCESSES - 1
    for rank, found in enumerate(results):
        own = 3 if rank < 2 else 2
        # Each has six tokens: x without its own columns, and its columns of the others' outputs.
        tokens = 6 * (WIDTH - own + others * (3 if rank < 2 else 1)) + 3 * 6 * TOP_K * others
        norms = found["moved"] - tokens - others
        assert 0 < norms <= 2 * 2 * 14


@pytest.mark.slow
def test_a_bank_of_the_meta_device_is_made_in_parts(results):
    for found in results:
        torch.testing.assert_close(found["made"], results[0]["made"])
    first, again, _ = results[0]["made"]
    assert not torch.equal(first, again)
    for atoms in results[0]["made"]:
        assert float(atoms.detach().square().sum(1).mean()) ** 0.5 == pytest.approx(0.3, rel=0.02)
        # No two processes have the same numbers.
        assert float(torch.corrcoef(atoms.detach().t()).fill_diagonal_(0).abs().max()) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("twice", "ValueError: bank must not be sharded already, got u with placements"),
        ("type", "TypeError: bank must be a BasisBank and mesh a DeviceMesh, got DSC and DeviceMesh"),
        ("x", "ValueError: x must have shape (..., d_in) and u (M, d_in), got (2, 7) and (14, 8)"),
        ("coefficients", "ValueError: coefficients must have the shape of indices, (2, 3), got (2, 1)"),
        ("indices", "ValueError: indices must have shape (2, 'K') with K >= 1, got (1, 3)"),
        ("sparse", "ValueError: bank must have sparse_gradients = False to be sharded"),
        ("narrow", "ValueError: bank.out_features must leave a column to each of 3 processes, got 4"),
        ("mesh", r"ValueError: mesh must have one dimension and all 3 processes, got (1, 3)"),
        # By torch, whose words are its own.
        ("replicated", "got mixed torch.Tensor and DTensor"),
        ("sharded again", "Error"),
    ],
)
def test_errors(name, message, results):
    for found in results:
        assert message in found["errors"].get(name, "")


if __name__ == "__main__":
    work(int(sys.argv[2]), sys.argv[1])
    # Torch may abort on leaving the interpreter while a thread of the group is still ending.
    os._exit(0)

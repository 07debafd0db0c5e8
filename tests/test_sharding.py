"""FSDP on two gloo processes: gradients of a model that is sharded block by block equal those of one process."""

import os
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn import functional

from torchdsc import DSC, BasisBank, Residual, frame_regularization, regularization
from torchdsc.baselines import DenseFFN
from torchdsc.nn import RoutedLayer, Router

pytest.importorskip("peft")

from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from torchdsc.adapters import DSCAdapterConfig, add_atoms
from torchdsc.diagnostics import Diagnostics
from torchdsc.models import DSCGPTConfig, DSCGPTForCausalLM

# Terms that are linear in tokens, or independent of them.
WEIGHTS = {"aux_weight": 0.0, "budget_weight": 0.0, "z_weight": 0.5, "frame_weight": 0.5}
OPTIONS = {"num_atoms": 14, "top_k": 3, **WEIGHTS}
SIZES = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 8}
PROCESSES, SEQUENCES, LENGTH = 2, 3, 9
LABELLED = SEQUENCES * (LENGTH - 1)


def make_tokens():
    tokens = torch.randint(0, 32, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(4))
    # Unequal shares.
    return tokens, [tokens[:2], tokens[2:]]


def move_some_gamma(model):
    """Of gammas that start at zero, and whose layers' regularisers then have no weight, let every other have moved."""
    layers = [module for module in model.modules() if isinstance(module, DSC)]
    for layer in layers[::2]:
        nn.init.normal_(layer.gamma)


def make_dscgpt(checkpointing=False, dtype=torch.float64, **options):
    options = OPTIONS | options
    config = DSCGPTConfig(**SIZES, dropout=0.0, initializer_range=0.3, feed_forward="dsc", feed_forward_options=options)
    model = DSCGPTForCausalLM(config).to(dtype)
    if options.get("gamma_init") == 0:
        move_some_gamma(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model, model.model.blocks


def precise_loss(logits, labels, vocab_size=None, num_items_in_batch=None, **_):
    total = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return total / num_items_in_batch


def make_llama(targets=("q_proj", "mlp"), **options):
    base = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.3)).double()
    config = DSCAdapterConfig(target_modules=list(targets), **OPTIONS | options)
    model = get_peft_model(base, config).double()
    move_some_gamma(model)
    model.base_model.model.loss_function = precise_loss
    return model, model.base_model.model.model.layers


def make_grown_llama(targets, **options):
    model, blocks = make_llama(targets, **options)
    add_atoms(model, 5, origin="more")
    return model, blocks


def loss_of(model, tokens):
    return model(input_ids=tokens, labels=tokens, num_items_in_batch=LABELLED).loss


def make_layers():
    bank = BasisBank(14, 8)
    layers = [Residual(DenseFFN(8, 6), DSC(8, bank=bank, **OPTIONS)) for _ in range(2)]
    return nn.Sequential(nn.Embedding(32, 8), *layers).double(), [bank, *layers]


def loss_of_layers(model, tokens):
    """L_frame once a step, beside the loss."""
    share = tokens.numel() / (SEQUENCES * LENGTH)
    task = model(tokens).square().sum() / (SEQUENCES * LENGTH * 8)
    terms = regularization(model, num_tokens=SEQUENCES * LENGTH, frame_share=0)
    return task + terms.total + share * frame_regularization(model)


CASES = {
    "default": (make_dscgpt, loss_of),
    "routed by embeddings": (
        partial(make_dscgpt, router_input="embeddings", router_context=3, input_context=4, router="low_rank"),
        loss_of,
    ),
    "one gamma": (partial(make_dscgpt, channelwise_gamma=False), loss_of),
    "shared bank": (partial(make_dscgpt, share_bank=True, attention_rank=2), loss_of),
    "shared bank, checkpointed": (partial(make_dscgpt, share_bank=True, checkpointing=True), loss_of),
    "gamma from zero": (partial(make_dscgpt, gamma_init=0.0), loss_of),
    "affine": (partial(make_dscgpt, router_norm="layer_affine", router_bias=True, activation="relu"), loss_of),
    "adapters": (partial(make_llama, gamma_init=0.0), loss_of),
    "adapters, shared": (
        partial(make_llama, ("q_proj", "o_proj"), gamma_init=0.0, share_bank=True, share_router=True),
        loss_of,
    ),
    "adapters, shared product keys": (
        partial(make_llama, ("q_proj",), share_router=True, router="product_key", num_atoms=16),
        loss_of,
    ),
    "adapters, atoms added": (partial(make_grown_llama, ("q_proj", "mlp")), loss_of),
    "adapters, atoms added to what is shared": (
        partial(make_grown_llama, ("q_proj", "o_proj"), share_bank=True, share_router=True),
        loss_of,
    ),
    "a bank of its own unit in several layers": (make_layers, loss_of_layers),
    "units inside blocks": (partial(make_dscgpt, share_bank=True), loss_of),
    "mixed precision": (partial(make_dscgpt, share_bank=True), loss_of),
}


def build(case):
    torch.manual_seed(3)
    make, loss = CASES[case]
    model, blocks = make()
    return model.train(), blocks, loss


def sharded_gradients(case, rank):
    model, blocks, loss = build(case)
    policy = {}
    if case == "mixed precision":
        policy["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.float32)
    parts = [part for layer in model.modules() if isinstance(layer, RoutedLayer) for part in (layer.bank, layer.router)]
    for part in parts:
        # What several blocks have is a unit of its own.
        if parts.count(part) > 1 and not isinstance(part, FSDPModule):
            fully_shard(part, **policy)
    if case == "units inside blocks":
        for module in dict.fromkeys(m for m in model.modules() if isinstance(m, BasisBank | Router)):
            if not isinstance(module, FSDPModule):
                fully_shard(module)
        for module in [m for m in model.modules() if isinstance(m, RoutedLayer)]:
            fully_shard(module)
    for module in (*blocks, model):
        if not isinstance(module, FSDPModule):
            fully_shard(module, **policy)
    _, parts = make_tokens()
    for _ in range(2):
        # A second step finds the state that the first one left.
        model.zero_grad()
        (loss(model, parts[rank]) * PROCESSES).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad.full_tensor() for name, grad in gradients.items() if grad is not None}


def measured(rank):
    """What diagnostics say of a sharded model where both processes have tokens, and where one has none."""
    model, blocks, _ = build("a bank of its own unit in several layers")
    for module in (*blocks, model):
        fully_shard(module)
    found = []
    for empty in (False, True):
        tokens = make_tokens()[1][rank]
        diagnostics = Diagnostics(model, tokens=8)
        diagnostics.begin()
        with torch.no_grad():
            model(tokens[:0] if empty and rank == 1 else tokens)
        found.append(diagnostics.end().means())
    return found


def flattened_error(rank):
    """What FSDP1 says with a unit a block, where it hides parameters and where not; then one unit's gradients."""
    messages = []
    for shows in (False, True):
        model, blocks, loss = build("default")
        for index, block in enumerate(blocks):
            blocks[index] = FullyShardedDataParallel(block, use_orig_params=shows, device_id=torch.device("cpu"))
        model = FullyShardedDataParallel(model, use_orig_params=shows, device_id=torch.device("cpu"))
        try:
            loss(model, make_tokens()[1][rank])
        except RuntimeError as error:
            messages.append(str(error))
    model, _, loss = build("one gamma")
    model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    (loss(model, make_tokens()[1][rank]) * PROCESSES).backward()
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        gradients = {name: parameter.grad.clone() for name, parameter in model.module.named_parameters()}
    return {"messages": messages, "gradients": gradients}


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    found = {case: sharded_gradients(case, rank) for case in CASES}
    flattened = flattened_error(rank)
    torch.save({"sharded": found, "flattened": flattened, "measured": measured(rank)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory, run_processes):
    """What both processes found, all cases in one start of them."""
    folder = tmp_path_factory.mktemp("sharding")
    run_processes(PROCESSES, __file__, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


def expected_gradients(case):
    model, _, loss = build(case)
    loss(model, make_tokens()[0]).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_equal(actual, expected, precision):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (actual[name] - gradient).abs().max()
        assert error <= precision * gradient.abs().max().clamp_min(1e-3), name


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_sharded_block_by_block_equals_one_process(case, results):
    expected = expected_gradients(case)
    assert any("bank" in name for name in expected)
    for found in results:
        assert_equal(found["sharded"][case], expected, 1e-4 if case == "mixed precision" else 1e-12)


@pytest.mark.slow
def test_flattened_parameters_are_refused_a_block_and_right_as_a_whole(results):
    for found in results:
        messages = found["flattened"]["messages"]
        assert len(messages) == 2
        assert all("must be whole" in message and "fully_shard" in message for message in messages)
        assert_equal(found["flattened"]["gradients"], expected_gradients("one gamma"), 1e-12)


@pytest.mark.slow
def test_diagnostics_do_not_wait_for_a_process_without_tokens(results):
    for rank, found in enumerate(results):
        both, one = found["measured"]
        assert {"measured_norm", "agreement", "effective_rank_u", "utilization"} <= both.keys()
        assert 0 < both["measured_norm"] < both["certified_norm"]
        assert "measured_norm" not in one
        assert ("utilization" in one) == (rank == 0)
        assert one["effective_rank_u"] == both["effective_rank_u"]


if __name__ == "__main__":
    work(int(sys.argv[2]), sys.argv[1])
    # Torch may abort on leaving the interpreter while a thread of the group is still ending.
    os._exit(0)

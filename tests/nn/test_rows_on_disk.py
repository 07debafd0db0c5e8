"""Banks left in the file they were loaded from."""

import ctypes
import mmap
import os
import sys

import pytest
import torch
from torch import nn

from torchdsc import DSC
from torchdsc.nn import BasisBank, leave_on_disk

pytest.importorskip("transformers")

from torchdsc.models import DSCGPTConfig, DSCGPTForCausalLM

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
OPTIONS = {"top_k": 6, "router": "ngram", "ngram_orders": [1, 2, 3], "frame_weight": 0.0}


@pytest.fixture
def folder(tmp_path):
    """A model whose banks have 12 MB each, in rows of a tenth of a page."""
    options = {**OPTIONS, "num_atoms": 30_000, "router_input": "embeddings", "router_context": 3}
    config = DSCGPTConfig(
        vocab_size=64,
        hidden_size=100,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        feed_forward_options=options,
    )
    DSCGPTForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def load(folder):
    return DSCGPTForCausalLM.from_pretrained(folder).eval()


def banks_of(model):
    return [module for module in model.modules() if isinstance(module, BasisBank)]


def pages_in_memory(atoms):
    """Which pages of the rows the system has in memory."""
    start = atoms.data_ptr() - atoms.data_ptr() % mmap.PAGESIZE
    size = atoms.data_ptr() + atoms.nbytes - start
    held = torch.zeros(-(-size // mmap.PAGESIZE), dtype=torch.uint8)
    function = ctypes.CDLL(None, use_errno=True).mincore
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    assert function(start, size, held.data_ptr()) == 0
    return start, held.bool()


def forget(model, folder):
    """Let the system drop what it has of the file."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for bank in banks_of(model):
        for atoms in (bank.u, bank.v):
            start = atoms.data_ptr() - atoms.data_ptr() % mmap.PAGESIZE
            madvise(start, atoms.data_ptr() + atoms.nbytes - start, 4)
    with (folder / "model.safetensors").open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if pages_in_memory(banks_of(model)[0].u)[1].float().mean() > 0.5:
        pytest.skip("this file system keeps files in memory")


@torch.no_grad()
def test_outputs_are_the_same(folder):
    ids = torch.randint(64, (2, 40))
    expected = load(folder)(ids).logits
    model = load(folder)
    assert leave_on_disk(model) == 2 * 2 * 30_000 * 100 * 4
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("ahead", [True, False])
@torch.no_grad()
def test_selected_rows_alone_are_read_and_before_they_are_used(ahead, folder):
    model = load(folder)
    leave_on_disk(model, ahead=ahead)
    forget(model, folder)
    layer = next(module for module in model.modules() if isinstance(module, DSC))
    routing = layer.route(torch.randint(1 << 40, (25, 3)))
    for atoms in (layer.bank.u, layer.bank.v):
        start, _ = pages_in_memory(atoms)
        rows = atoms.data_ptr() + routing.indices.unique() * 400 - start
        needed = torch.zeros(len(pages_in_memory(atoms)[1]), dtype=torch.bool)
        needed[rows // mmap.PAGESIZE] = needed[(rows + 399) // mmap.PAGESIZE] = True
        # The system may take its time.
        for _ in range(200):
            held = pages_in_memory(atoms)[1]
            if not ahead or bool(held[needed].all()):
                break
            torch.randn(100, 100) @ torch.randn(100, 100)
        assert bool(held[needed].all()) == ahead
        assert int(held.sum()) <= int(needed.sum()) + 2
    layer(torch.randn(25, 100), routing=routing)
    assert int(pages_in_memory(layer.bank.u)[1].sum()) <= 2 * routing.indices.unique().numel() + 2


@torch.no_grad()
def test_no_token_asks_for_nothing(folder):
    model = load(folder)
    leave_on_disk(model)
    layer = next(module for module in model.modules() if isinstance(module, DSC))
    assert layer.route(torch.zeros(0, 3, dtype=torch.int64)).indices.shape == (0, 6)


def test_what_is_not_on_disk_is_refused(folder):
    with pytest.raises(ValueError, match="model must have a bank of atoms, got Linear"):
        leave_on_disk(nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"bank\.u must be mapped from a file, .* got one of torch\.float32 on cpu in memory"
    ):
        leave_on_disk(DSC(8, num_atoms=9, top_k=3, router="ngram"))
    with pytest.raises(ValueError, match=r"torch\.bfloat16 on cpu in memory"):
        leave_on_disk(DSCGPTForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))


def test_kept_atoms_and_shared_memory_are_refused(folder):
    model = load(folder)
    bank = banks_of(model)[0]
    bank.arrange(torch.arange(bank.num_atoms), 3)
    with pytest.raises(ValueError, match=r"bank must have no kept atoms to stay on disk, got 3"):
        leave_on_disk(model)
    layer = DSC(8, num_atoms=9, top_k=3, router="ngram").share_memory()
    with pytest.raises(ValueError, match="must be mapped from a file"):
        leave_on_disk(layer)
    with pytest.raises(TypeError, match="ahead must be"):
        leave_on_disk(load(folder), ahead="no")
    with pytest.raises(TypeError, match="model must be"):
        leave_on_disk("x")


def test_another_system_is_refused(folder, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(OSError, match="leave_on_disk needs Linux, got darwin"):
        leave_on_disk(load(folder))

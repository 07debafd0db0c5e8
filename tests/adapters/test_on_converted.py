"""Adapters on a model that was converted."""

import pytest
import torch
from peft import get_peft_model

from torchdsc import convert, last_regularization
from torchdsc.nn import RoutedLayer


@pytest.mark.parametrize("method", ["dsc", "molora"])
def test_unloading_leaves_the_converted_models_regularisers(method, make_base, make_config, make_batch):
    model, batch = make_base("llama"), make_batch("llama")
    convert(model, num_atoms=16, top_k=4)
    left = get_peft_model(model, make_config(method, target_modules=["q_proj"])).unload().train().requires_grad_(True)
    left(**batch).loss.backward()
    assert last_regularization(left)["aux"] > 0
    assert any(isinstance(module, RoutedLayer) for module in left.modules())
    assert all(torch.isfinite(part.grad).all() for part in left.parameters() if part.grad is not None)

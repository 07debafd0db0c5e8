"""Exported layers and models, as PyTorch programs and in ONNX, against eager ones at other sizes."""

import pytest
import torch

from torchdsc import DSC
from torchdsc.baselines import PEER, MixtureOfLoRAs, StandardMoE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch"),
]

LAYERS = {
    "linear": lambda: DSC(8, 6, num_atoms=25, top_k=4, router_bias=True, activation="relu"),
    "low rank": lambda: DSC(8, num_atoms=25, top_k=4, router="low_rank", router_norm="layer_affine"),
    "product keys": lambda: DSC(8, num_atoms=25, top_k=4, router="product_key", router_heads=2, impl="dense"),
    "basic": lambda: DSC.basic(8, num_atoms=25, top_k=4, gate="mean", z_loss_on_raw_logits=True),
    "mixture": lambda: MixtureOfLoRAs(8, 6, num_experts=4, rank=2),
    "moe": lambda: StandardMoE(8, 6, 4, shared_experts=1),
    "peer": lambda: PEER(8, 6, num_experts=25),
}
SIZES = {0: "batch", 1: "length"}


def spread(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module.eval()


@pytest.fixture
def run():
    """The first output of a file for named tensors."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")

    def call(path, **tensors):
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        first, *_ = session.run(None, {name: tensor.numpy() for name, tensor in tensors.items()})
        return torch.from_numpy(first)

    return call


@pytest.mark.parametrize("name", LAYERS)
def test_layers_export_as_plain_operations(name):
    layer, x = spread(LAYERS[name]()), torch.randn(4, 5, 8)
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=64)}
    for strict in (False, True):
        program = torch.export.export(layer, (torch.randn(2, 7, 8),), dynamic_shapes={"x": sizes}, strict=strict)
        torch.testing.assert_close(program.module()(x), layer(x))
        assert {node.target.namespace for node in program.graph.nodes if hasattr(node.target, "namespace")} == {"aten"}


@pytest.mark.parametrize("name", ["linear", "product keys"])
def test_layers_in_onnx(name, run, tmp_path):
    layer, x, path = spread(LAYERS[name]()), torch.randn(4, 5, 8), tmp_path / "layer.onnx"
    torch.onnx.export(
        layer, (torch.randn(2, 7, 8),), path, dynamo=True, dynamic_shapes={"x": SIZES}, input_names=["x"], verbose=False
    )
    torch.testing.assert_close(run(path, x=x), layer(x).detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["dsc", "dsc, embeddings", "moe"])
def test_models_in_onnx(kind, make_model, run, tmp_path):
    model, path = make_model(kind), tmp_path / "model.onnx"
    torch.onnx.export(
        model,
        kwargs={"input_ids": torch.randint(0, 61, (2, 7)), "use_cache": False},
        f=path,
        dynamo=True,
        dynamic_shapes={"input_ids": SIZES, "use_cache": None},
        verbose=False,
    )
    input_ids = torch.randint(0, 61, (3, 11))
    torch.testing.assert_close(run(path, input_ids=input_ids), model(input_ids).logits.detach(), rtol=1e-4, atol=1e-4)

"""Exported layers and models, as PyTorch programs and in ONNX, against eager ones at other sizes."""

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from torchdsc import DSC, convert, recommended
from torchdsc.adapters import DSCAdapterConfig
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


@pytest.fixture
def build(make_model):
    """A model of transformers in plain PyTorch; converted and adapted ones have layers of ours inside."""

    def make(kind):
        if kind.startswith("dsc") or kind == "moe":
            return make_model(kind, num_hidden_layers=1)
        config = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        base = LlamaForCausalLM(
            LlamaConfig(**config, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3)
        )
        _, _, by = kind.partition(", ")
        if kind.startswith("converted"):
            convert(base, mode="replace", **recommended(by, num_atoms=20, top_k=6))
            return base.eval()
        given = {"embeddings": recommended(top_k=4), "n-grams": {"router": "ngram", "top_k": 4}}[by]
        beside = DSCAdapterConfig(target_modules=["self_attn", "mlp"], num_atoms=20, **{**given, "gamma_init": 0.3})
        # PEFT's own call takes what it is given as **kwargs, which an export cannot name.
        return get_peft_model(base, beside).eval().get_base_model()

    return make


@pytest.mark.parametrize(
    "kind",
    [
        "dsc",
        "dsc, embeddings",
        "dsc, n-grams",
        "moe",
        "converted, embeddings",
        "adapted, embeddings",
        "adapted, n-grams",
    ],
)
def test_models_export_for_all_sizes(kind, build, run, tmp_path):
    """Whatever they were exported with, also for sequences shorter than a short convolution or an n-gram."""
    model, path = build(kind), tmp_path / "model.onnx"
    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=24)}
    program = torch.export.export(
        model,
        (),
        {"input_ids": torch.randint(0, 61, (2, 7)), "use_cache": False},
        dynamic_shapes={"input_ids": sizes, "use_cache": None},
    )
    torch.onnx.export(program, f=path, dynamo=True, verbose=False)
    for shape in ((3, 11), (4, 2)):
        input_ids = torch.randint(0, 61, shape)
        expected = model(input_ids, use_cache=False).logits.detach()
        torch.testing.assert_close(program.module()(input_ids=input_ids, use_cache=False).logits, expected)
        torch.testing.assert_close(run(path, input_ids=input_ids), expected, rtol=1e-4, atol=1e-4)

"""Parameter groups: what is decayed, in models of every kind and under Trainer."""

import copy

import pytest
import torch

import torchdsc
from torchdsc import DSC, Residual, ShortConvolution, build_optimizer, decay_parameter_names, parameter_groups
from torchdsc.optim import JoinedOptimizer

NOT_DECAYED = ("gamma", "router", "context", "embed", "norm", "bias")


class Model(torch.nn.Module):
    """An embedding, a context, DSC beside a linear layer, a norm and a head that is tied to the embedding."""

    def __init__(self, **options):
        super().__init__()
        self.embed = torch.nn.Embedding(20, 8)
        self.context = ShortConvolution(8, 3)
        self.layer = Residual(torch.nn.Linear(8, 8), DSC(8, num_atoms=16, top_k=4, router_bias=True, **options))
        self.norm = torch.nn.LayerNorm(8)
        self.head = torch.nn.Linear(8, 20)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, labels=None):
        seen = self.embed(input_ids)
        y = self.head(self.norm(self.layer(seen, router_input=self.context(seen))))
        return {"loss": torch.nn.functional.cross_entropy(y.flatten(0, 1), labels.flatten()) + self.extra(), "y": y}

    def extra(self):
        return torchdsc.regularization(self).total if self.training else 0.0


def check(model):
    """Every parameter is in one group; matrices but those above are decayed, and so are atoms."""
    groups = parameter_groups(model, learning_rate=0.1, weight_decay=0.3, router_lr_multiplier=5.0)
    found = {id(p): group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found)
    names = decay_parameter_names(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in found
            continue
        decayed = parameter.dim() >= 2 and not any(part in name for part in NOT_DECAYED)
        assert found[id(parameter)]["weight_decay"] == (0.3 if decayed else 0.0), name
        assert (name in names) == decayed, name
        assert found[id(parameter)]["lr"] == (0.5 if "router." in name else 0.1), name


@pytest.mark.parametrize("channelwise_gamma", [True, False])
def test_own_model(channelwise_gamma):
    check(Model(channelwise_gamma=channelwise_gamma))


def test_models_of_transformers():
    transformers = pytest.importorskip("transformers")
    from torchdsc.models import DSCGPTConfig, DSCGPTForCausalLM

    options = {"num_atoms": 16, "top_k": 4, "router_input": "embeddings", "router_context": 3, "input_context": 4}
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    check(DSCGPTForCausalLM(DSCGPTConfig(feed_forward_options=options, intermediate_size=4, **sizes)))
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(intermediate_size=8, **sizes, tie_word_embeddings=True)
    )
    torchdsc.convert(model, num_atoms=16, top_k=4)
    check(model)


def test_adapters():
    peft = pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    from torchdsc.adapters import DSCAdapterConfig

    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = DSCAdapterConfig(target_modules=["q_proj", "v_proj"], num_atoms=8, top_k=2, share_bank=True)
    check(peft.get_peft_model(LlamaForCausalLM(LlamaConfig(intermediate_size=8, **sizes)), config))


def test_row_sparse_banks_have_an_optimizer_of_their_own():
    model = Model(sparse_gradients=True, frame_samples=4)
    optimizer = build_optimizer(model, learning_rate=0.1, weight_decay=0.3, atom_lr_multiplier=2.0)
    assert isinstance(optimizer, JoinedOptimizer)
    last = optimizer.param_groups[-1]
    assert {id(p) for p in last["params"]} == {id(p) for p in model.layer.dsc.bank.parameters()}
    assert last["lr"] == 0.2
    before = model.layer.dsc.bank.u.detach().clone()
    ids = torch.arange(6).view(2, 3)
    model(ids, ids)["loss"].backward()
    assert model.layer.dsc.bank.u.grad.is_sparse
    optimizer.step()
    assert not torch.equal(model.layer.dsc.bank.u, before)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")
def test_rows_of_parametrized_banks_are_atoms():
    model = Model()
    torch.nn.utils.parametrize.register_parametrization(model.layer.dsc.bank, "u", torch.nn.Identity())
    groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.0, atom_lr_multiplier=3.0)
    (atoms,) = [group["params"] for group in groups if group["lr"] == 3.0]
    assert len(atoms) == 2


class TestJoined:
    @staticmethod
    def make():
        model = Model(sparse_gradients=True, frame_weight=0.0)
        return model, build_optimizer(model, learning_rate=0.1, weight_decay=0.0)

    def test_refuses_groups_that_no_part_would_train(self):
        _, optimizer = self.make()
        with pytest.raises(ValueError, match="param_group must be given to one of the joined optimizers"):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})

    def test_a_copy_of_model_and_optimizer_trains(self):
        model, optimizer = copy.deepcopy(self.make())
        before = {name: value.clone() for name, value in model.named_parameters()}
        ids = torch.randint(20, (2, 5))
        model.train()(ids, ids)["loss"].backward()
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
        moved = {id(p) for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        held, *others = optimizer.param_groups
        assert not moved & {id(p) for p in held["params"]}
        assert moved & {id(p) for group in others for p in group["params"]}

    @staticmethod
    def trained(model, optimizer, steps):
        for step in range(steps):
            ids = torch.randint(20, (2, 5), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model.train()(ids, ids)["loss"].backward()
            optimizer.step()
        return [parameter.detach().clone() for parameter in model.parameters()]

    @pytest.mark.parametrize("older", [False, True])
    def test_goes_on_from_a_state(self, older):
        model, optimizer = self.make()
        self.trained(model, optimizer, 2)
        state = copy.deepcopy(optimizer.state_dict())
        assert {number for group in state["param_groups"] for number in group["params"]} >= {*state["state"]}
        if older:
            state = copy.deepcopy({"parts": [part.state_dict() for part in optimizer._parts]})
        other = copy.deepcopy(model)
        again = build_optimizer(other, learning_rate=0.7, weight_decay=0.0)
        again.load_state_dict(state)
        assert again.param_groups[0]["lr"] == 0.1
        for one, two in zip(self.trained(model, optimizer, 2), self.trained(other, again, 2), strict=True):
            assert torch.equal(one, two)
        with pytest.raises(ValueError, match="param_groups must be"):
            again.load_state_dict({"state": {}, "param_groups": []})

    @pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")
    def test_distributed_checkpoints_take_it(self):
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

        models = [Model(frame_weight=0.0) for _ in range(2)]
        optimizers = [build_optimizer(m, learning_rate=0.1, weight_decay=0.0, optimizer="muon") for m in models]
        self.trained(models[0], optimizers[0], 2)
        weights, state = copy.deepcopy(get_state_dict(models[0], optimizers[0]))
        set_state_dict(models[1], optimizers[1], model_state_dict=weights, optim_state_dict=state)
        after = [self.trained(*pair, 2) for pair in zip(models, optimizers, strict=True)]
        assert all(torch.equal(one, two) for one, two in zip(*after, strict=True))


class TestMuon:
    @staticmethod
    def build(model, **options):
        return build_optimizer(
            model, learning_rate=0.01, weight_decay=0.3, router_lr_multiplier=5.0, optimizer="muon", **options
        )

    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize(
        ("kind", "options", "hidden"),
        [
            ("dense", {}, {"up", "down"}),
            ("gated", {"router_input": "embeddings", "router_context": 2}, {"gate", "up", "down"}),
            ("moe", {"num_experts": 4, "shared_experts": 1}, {"up", "down"}),
            ("mixture_of_loras", {"num_experts": 4, "rank": 2}, {"up", "down"}),
            ("peer", {"num_experts": 16, "query_norm": "batch"}, {"up", "down"}),
            ("dsc", {"num_atoms": 16, "top_k": 4, "input_context": 3, "attention_rank": 2}, {"up", "down"}),
        ],
    )
    def test_has_the_hidden_matrices_and_nothing_else(self, kind, options, hidden, tied):
        pytest.importorskip("transformers")
        from torchdsc.models import DSCGPTConfig, DSCGPTForCausalLM

        config = DSCGPTConfig(
            vocab_size=20,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            feed_forward=kind,
            feed_forward_options=options,
            intermediate_size=6,
            tie_word_embeddings=tied,
        )
        model = DSCGPTForCausalLM(config)
        optimizer = self.build(model, muon_learning_rate=0.05)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        found = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
        assert len(found) == len(names) == sum(len(group["params"]) for group in optimizer.param_groups)
        muon = {name: group for name, group in found.items() if "ns_steps" in group}
        layer = {name.removeprefix("model.blocks.0.") for name in muon}
        ends = {name.split(".")[-2] for name in layer if name.startswith("feed_forward.")}
        assert {name for name in layer if name.startswith("attention")} == {
            "attention.qkv_proj.weight", "attention.out_proj.weight"
        }  # fmt: skip
        assert ends == hidden
        assert len(muon) == 2 + len(hidden)
        assert {(group["lr"], group["weight_decay"]) for group in muon.values()} == {(0.05, 0.3)}
        for name, group in found.items():
            if name not in muon:
                assert group["lr"] == pytest.approx(0.05 if "router." in name else 0.01), name

    def test_steps_are_those_of_torch(self):
        model = Model()
        optimizer = self.build(model)
        weight = torch.nn.Parameter(model.layer.base.weight.detach().clone())
        known = torch.optim.Muon([weight], lr=0.02, weight_decay=0.3)
        ids = torch.arange(6).view(2, 3)
        for _ in range(3):
            optimizer.zero_grad()
            model(ids, ids)["loss"].backward()
            weight.grad = model.layer.base.weight.grad.clone()
            optimizer.step()
            known.step()
            assert torch.equal(weight, model.layer.base.weight)

    def test_one_scheduler_moves_all_rates_and_a_state_goes_on(self):
        model = Model(sparse_gradients=True, frame_samples=4)
        ids = torch.arange(6).view(2, 3)
        optimizer = self.build(model, muon_learning_rate=0.05)
        assert [type(part).__name__ for part in optimizer._parts] == ["AdamW", "Muon", "SparseAdam"]

        def steps(model, optimizer):
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
            for _ in range(2):
                optimizer.zero_grad()
                torch.manual_seed(0)
                model(ids, ids)["loss"].backward()
                optimizer.step()
                scheduler.step()

        steps(model, optimizer)
        assert {group["lr"] for part in optimizer._parts for group in part.param_groups} == {
            0.0025, 0.0125
        }  # fmt: skip
        again = copy.deepcopy(model)
        other = self.build(again, muon_learning_rate=0.05)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        steps(model, optimizer)
        steps(again, other)
        for ours, theirs in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(ours, theirs)

    def test_errors(self, monkeypatch):
        with pytest.raises(ValueError, match=r"optimizer must be one of \('adamw', 'muon'\), got 'sgd'"):
            build_optimizer(Model(), learning_rate=0.1, weight_decay=0.0, optimizer="sgd")
        with pytest.raises(ValueError, match="muon_learning_rate must be finite and >= 0, got -1"):
            self.build(Model(), muon_learning_rate=-1.0)
        monkeypatch.delattr(torch.optim, "Muon", raising=False)
        with pytest.raises(ImportError, match=r"optimizer='muon' needs torch >= 2\.9, got "):
            self.build(Model())


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_errors(value):
    with pytest.raises(ValueError, match="learning_rate must be finite and >= 0"):
        build_optimizer(Model(), learning_rate=value, weight_decay=0.0)
    with pytest.raises(ValueError, match="weight_decay must be finite and >= 0"):
        build_optimizer(Model(), learning_rate=0.1, weight_decay=value)


@pytest.mark.parametrize("way", ["optimizers", "names"])
def test_under_trainer(way, tmp_path):
    """A step with decay changes what is decayed, and nothing else, against a step without."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    class OwnTrainer(Trainer):
        def get_decay_parameter_names(self, model):
            return decay_parameter_names(model)

    def step(model, weight_decay):
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            learning_rate=0.1,
            weight_decay=weight_decay,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        given = {}
        if way == "optimizers":
            given["optimizers"] = (build_optimizer(model, learning_rate=0.1, weight_decay=weight_decay), None)
        kind = OwnTrainer if way == "names" else Trainer
        examples = [{"input_ids": torch.arange(6) + i, "labels": torch.arange(6) + i} for i in range(4)]
        kind(model, arguments, train_dataset=examples, **given).train()
        return dict(model.named_parameters())

    model = Model()
    # Without a gradient a parameter moves by decay alone.
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    without, decayed = step(copy.deepcopy(model), 0.0), step(copy.deepcopy(model), 0.3)
    moved = {name for name in without if not torch.equal(without[name], decayed[name])}
    assert moved == {"layer.base.weight", "layer.dsc.bank.u", "layer.dsc.bank.v"}

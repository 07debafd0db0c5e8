"""DSCGPT in training: its regularisers, checkpointing, compilation, and exactness under Trainer's accumulation."""

import copy

import pytest
import torch
import torch._dynamo.testing
import transformers
from torch.nn import functional

from torchdsc import RegularizedLoss, regularization
from torchdsc.losses import frame_regularization
from torchdsc.nn import RoutedLayer

# Weights that make each term felt beside a task loss of about 10.
WEIGHTS = {"aux_weight": 0.5, "z_weight": 0.1}
DSC_WEIGHTS = {"budget_weight": 0.5, "frame_weight": 0.05, "budget": 50.0}
# Linear in tokens, or independent of them: exact however a step is cut up.
LINEAR = {"aux_weight": 0.0, "z_weight": 0.1}
DSC_LINEAR = {"budget_weight": 0.0, "frame_weight": 0.05}


def precise_loss(logits, labels, num_items_in_batch=None, shift_labels=None, **_):
    """transformers' loss is float32 whatever the model is."""
    total = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return total / ((labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.fixture
def make_training(make_model):
    """A model in training with heavy regularisers, and a float64 loss where it is float64."""

    def make(kind, *, linear=False, dtype=torch.float64, **changes):
        options = LINEAR if linear else WEIGHTS
        if kind.startswith("dsc"):
            options = {**options, **(DSC_LINEAR if linear else DSC_WEIGHTS)}
        if kind.startswith(("dense", "gated")):
            options = {}
        model = make_model(kind, dtype=dtype, feed_forward_options=options, **changes)
        if dtype is torch.float64:
            model.loss_function = precise_loss
        return model.train()

    return make


@pytest.fixture
def step():
    """Four sequences of one optimizer step, of unequal labelled tokens; the last has none."""
    input_ids = torch.randint(1, 61, (4, 12))
    labels = input_ids.clone()
    labels[0, :7], labels[1, 3:5], labels[3, :] = -100, -100, -100
    return {"input_ids": input_ids, "labels": labels}


class TestLoss:
    def test_is_the_task_loss_in_evaluation(self, kind, make_training, input_ids):
        output = make_training(kind).eval()(input_ids, labels=input_ids)
        assert torch.equal(output.loss, output.task_loss)
        assert output.regularization is None
        assert not output.task_loss.requires_grad

    def test_includes_the_regularisers_in_training(self, routed_kind, make_training, input_ids):
        model = make_training(routed_kind)
        output = model(input_ids, labels=input_ids)
        options, terms = model.config.feed_forward_options, output.regularization
        expected = sum(options.get(f"{name}_weight", 0.0) * value for name, value in terms.items())
        torch.testing.assert_close(output.loss.detach() - output.task_loss, expected)
        active = {"aux", "budget", "frame", "z"} if routed_kind.startswith("dsc") else {"aux", "z"}
        if options.get("router") == "ngram":
            # No logit of its router can be trained.
            active = {"frame"}
        assert {name for name, value in terms.items() if value > 0} == active
        assert not any(value.requires_grad for value in terms.values())

    def test_of_a_dense_model_is_the_task_loss(self, make_training, input_ids):
        output = make_training("dense")(input_ids, labels=input_ids)
        assert torch.equal(output.loss.detach(), output.task_loss)

    def test_padding_does_not_count_in_the_regularisers(self, routed_kind, make_training, input_ids):
        model = make_training(routed_kind)
        mask = torch.ones_like(input_ids)
        mask[:, 8:] = 0
        labels = input_ids.masked_fill(mask == 0, -100)
        masked = model(input_ids, attention_mask=mask, labels=labels).loss
        torch.testing.assert_close(masked, model(input_ids[:, :8], labels=labels[:, :8]).loss)

    def test_shift_labels_are_labels_shifted_already(self, routed_kind, make_training, step):
        model = make_training(routed_kind, dtype=torch.float32)
        shifted = functional.pad(step["labels"][:, 1:], (0, 1), value=-100)
        expected = model(**step, num_items_in_batch=20).loss
        # They come before labels, and do without them.
        for labels in ({}, {"labels": torch.zeros_like(shifted)}):
            actual = model(step["input_ids"], shift_labels=shifted, num_items_in_batch=20, **labels).loss
            torch.testing.assert_close(actual, expected)

    def test_under_autocast(self, kind, make_training, input_ids):
        model = make_training(kind, dtype=torch.float32)
        expected = model(input_ids, labels=input_ids)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(input_ids, labels=input_ids)
        assert output.loss.dtype == torch.float32
        torch.testing.assert_close(output.loss, expected.loss, rtol=2e-2, atol=0)
        output.loss.backward()
        assert all(gradient.isfinite().all() for gradient in gradients(model).values())

    def test_packed_sequences_do_not_see_each_other(self, kind, make_training, input_ids):
        model = make_training(kind)
        positions = torch.cat([torch.arange(7), torch.arange(5)]).unsqueeze(0)
        packed = model(input_ids[:1], position_ids=positions).logits
        torch.testing.assert_close(packed[:, :7], model(input_ids[:1, :7]).logits)
        torch.testing.assert_close(packed[:, 7:], model(input_ids[:1, 7:]).logits)

    def test_without_labels_the_terms_wait_to_be_collected(self, routed_kind, make_training, input_ids):
        model = make_training(routed_kind)
        output = model(input_ids, labels=input_ids)
        assert not any(len(m.statistics_log) for m in model.modules() if isinstance(m, RoutedLayer))
        _output = model(input_ids)
        torch.testing.assert_close(regularization(model).total, output.loss - output.task_loss)

    def test_of_the_model_alone_wait_too(self, routed_kind, make_training, input_ids):
        """As where a trainer applies the head itself."""
        model = make_training(routed_kind)
        output = model(input_ids, labels=input_ids)
        hidden_states = model.model(input_ids).last_hidden_state
        torch.testing.assert_close(regularization(model).total, output.loss - output.task_loss)
        hidden_states.sum().backward()
        with pytest.raises(RuntimeError, match="were not collected before its backward pass"):
            model.model(input_ids).last_hidden_state.sum().backward()
        with pytest.raises(RuntimeError, match="were not collected before its backward pass"):
            model.model(input_ids, output_hidden_states=True).hidden_states[-2].sum().backward()

    def test_raise_where_another_loss_is_used(self, routed_kind, make_training, input_ids):
        model = make_training(routed_kind)
        with pytest.raises(RuntimeError, match="the model's loss, which holds the regularisers, is not in the loss"):
            model(input_ids, labels=input_ids).logits.sum().backward()
        model(input_ids, labels=input_ids, output_hidden_states=True).loss.backward()

    def test_of_a_dropped_pass_do_not_count(self, routed_kind, make_training, input_ids):
        model = make_training(routed_kind)
        output = model(input_ids, labels=input_ids)
        for _ in range(3):
            model(input_ids)
        _logits = model(input_ids).logits
        torch.testing.assert_close(regularization(model).total, output.loss - output.task_loss)

    def test_frame_alone(self, make_training, input_ids):
        model = make_training("dsc", linear=True)
        for block in model.model.blocks:
            block.routed_layer.regularizers = type(block.routed_layer.regularizers)(frame=0.05)
        output = model(input_ids, labels=input_ids)
        torch.testing.assert_close(output.loss - output.task_loss, frame_regularization(model))


class TestCheckpointing:
    def test_not_reentrant_changes_no_gradient(self, kind, make_training, step):
        model = make_training(kind)
        model(**step).loss.backward()
        expected = gradients(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**step).loss.backward()
        torch.testing.assert_close(gradients(model), expected, rtol=1e-12, atol=1e-14)

    def test_reentrant_raises_where_regularisers_would_vanish(self, routed_kind, make_training, step):
        model = make_training(routed_kind)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        if model.config.model_options.router_input == "embeddings":
            # Routed before the checkpoint: nothing vanishes.
            model(**step).loss.backward()
            return
        with pytest.raises(RuntimeError, match="reentrant checkpointing"):
            model(**step)

    def test_counts_the_load_of_experts_once(self, make_training, step):
        """By which the bias for selection moves."""
        model = make_training("moe, gated")
        routers = [block.routed_layer.router for block in model.model.blocks]
        expected = []
        for checkpointed in (False, True):
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model(**step).loss.backward()
            loads = [router.load.tolist() for router in routers]
            assert [sum(load) for load in loads] == [2 * step["labels"].numel()] * 2
            expected.append(loads)
            for router in routers:
                router.load.zero_()
        assert expected[0] == expected[1]

    @pytest.mark.parametrize(
        "kind",
        [
            *("dense", "dense, embeddings", "gated", "gated, embeddings"),
            *("dsc, embeddings", "moe, embeddings", "mixture_of_loras, own embedding"),
        ],
    )
    def test_reentrant_is_fine_where_no_block_routes(self, kind, make_training, step):
        model = make_training(kind)
        model(**step).loss.backward()
        expected = gradients(model)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model(**step).loss.backward()
        torch.testing.assert_close(gradients(model), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "checkpointed", "backend"),
    [
        ("dense", False, "aot_eager"),
        ("gated, embeddings", True, "aot_eager"),
        ("moe", False, "aot_eager"),
        ("moe, embeddings", True, "aot_eager"),
        ("moe, gated", True, "aot_eager"),
        ("mixture_of_loras", False, "aot_eager"),
        ("dsc", True, "aot_eager"),
        ("dsc", False, "inductor"),
    ],
)
def test_compiles_to_one_graph(kind, checkpointed, backend, make_training, step):
    model = make_training(kind, dtype=torch.float32, num_hidden_layers=1)
    loss = model(**step).loss
    loss.backward()
    expected = gradients(model)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)(**step).loss
    compiled.backward()
    torch.testing.assert_close(compiled, loss)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "is_trained", "dynamic"),
    [
        *(("dsc", True, True), ("dsc", True, None), ("dsc", False, None)),
        *(("dsc, embeddings", True, None), ("dsc, n-grams", True, None), ("mixture_of_loras", True, True)),
    ],
)
def test_does_not_compile_anew_for_other_sizes(kind, is_trained, dynamic, make_training):
    model = make_training(kind, dtype=torch.float32, num_hidden_layers=1).train(is_trained)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=dynamic)
    graphs = []
    for batch, length in ((2, 9), (3, 12), (5, 7), (4, 15)):
        ids = torch.randint(model.config.vocab_size, (batch, length))
        with torch.set_grad_enabled(is_trained):
            loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
        if is_trained:
            loss.backward()
        torch.testing.assert_close(loss, model(input_ids=ids, labels=ids, use_cache=False).loss)
        graphs.append(counter.frame_count)
    # Once for the first size, and once for any.
    assert graphs[0] <= graphs[1] == graphs[-1] == 2


class TestAccumulation:
    """With ``num_items_in_batch``, as Trainer passes it."""

    @staticmethod
    def pieces(step, accumulation):
        chunks = [value.chunk(accumulation) for value in step.values()]
        return [dict(zip(step, chunk, strict=True)) for chunk in zip(*chunks, strict=True)]

    @pytest.mark.parametrize("accumulation", [2, 4])
    def test_leaves_the_gradient_as_it_is(self, kind, accumulation, make_training, step):
        model, items = make_training(kind, linear=True), (step["labels"][:, 1:] != -100).sum()
        model(**step, num_items_in_batch=items).loss.backward()
        expected = gradients(model)
        for piece in self.pieces(step, accumulation):
            model(**piece, num_items_in_batch=items).loss.backward()
        torch.testing.assert_close(gradients(model), expected, rtol=1e-11, atol=1e-14)

    def test_one_step_is_that_without_a_count(self, kind, make_training, input_ids):
        """Where every routed token has a label, but for the last of each sequence."""
        model = make_training(kind, linear=True)
        plain = model(input_ids, labels=input_ids)
        counted = model(input_ids, labels=input_ids, num_items_in_batch=33)
        torch.testing.assert_close(counted.task_loss, plain.task_loss)
        if kind.startswith("dsc"):
            torch.testing.assert_close(counted.regularization["frame"], plain.regularization["frame"])
        if not kind.startswith(("dense", "gated")):
            torch.testing.assert_close(counted.regularization["z"], plain.regularization["z"] * 36 / 33)

    def test_nonlinear_terms_are_the_token_weighted_mean(self, routed_kind, make_training, step):
        model = make_training(routed_kind)
        step["attention_mask"] = torch.ones_like(step["labels"])
        step["attention_mask"][1, 5:] = 0
        step["attention_mask"][2, 9:] = 0
        routed = int(step["attention_mask"].sum())
        means, weighted = [], []
        for piece in self.pieces(step, 4):
            share = int(piece["attention_mask"].sum()) / routed
            means.append({name: value * share for name, value in model(**piece).regularization.items()})
            weighted.append(model(**piece, num_items_in_batch=routed).regularization)
        for name in ("aux", "budget", "z"):
            torch.testing.assert_close(sum(w[name] for w in weighted), sum(m[name] for m in means))


class RegularizedTrainer(RegularizedLoss, transformers.Trainer):
    pass


class TestTrainer:
    @pytest.fixture
    def make_trainer(self, tmp_path):
        """The real Trainer, for one optimizer step."""
        pytest.importorskip("accelerate")
        from transformers import Trainer, TrainingArguments

        def make(model, step, accumulation=1, compute_loss_func=None, cls=Trainer, **options):
            arguments = TrainingArguments(
                output_dir=str(tmp_path),
                per_device_train_batch_size=4 // accumulation,
                gradient_accumulation_steps=accumulation,
                max_steps=1,
                optim="sgd",
                learning_rate=0.1,
                lr_scheduler_type="constant",
                max_grad_norm=0.0,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                **options,
            )
            examples = [{name: value[i] for name, value in step.items()} for i in range(4)]
            return cls(
                model,
                arguments,
                train_dataset=examples,
                eval_dataset=examples,
                compute_loss_func=compute_loss_func,
            )

        return make

    def test_accumulation_takes_the_same_step(self, routed_kind, make_training, make_trainer, step):
        model = make_training(routed_kind, linear=True)
        start, results = copy.deepcopy(model.state_dict()), []
        for accumulation in (1, 2, 4):
            model.load_state_dict(start)
            make_trainer(model, step, accumulation).train()
            results.append(copy.deepcopy(model.state_dict()))
        embedding = "model.embed_tokens.weight"
        assert not torch.equal(results[0][embedding], start[embedding])
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=1e-11, atol=1e-13)

    def test_evaluates_the_task_loss_and_predicts_logits(self, kind, make_training, make_trainer, step):
        model = make_training(kind)
        trainer = make_trainer(model, step)
        expected = model.eval()(**step)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.task_loss.item(), rel=1e-6)
        predictions = trainer.predict(trainer.eval_dataset).predictions
        torch.testing.assert_close(torch.from_numpy(predictions), expected.logits.detach())

    @pytest.mark.parametrize(
        "options",
        [{"label_smoothing_factor": 0.1}, {"compute_loss_func": lambda outputs, labels, **_: outputs.logits.sum()}],
        ids=["label smoothing", "loss function"],
    )
    def test_options_that_take_the_labels_out_raise(self, options, routed_kind, make_training, make_trainer, step):
        with pytest.raises(RuntimeError, match=r"put torchdsc.RegularizedLoss before the class of a trainer"):
            make_trainer(make_training(routed_kind), step, **options).train()

    def test_those_options_work_with_regularized_loss(self, routed_kind, make_training, make_trainer, step):
        """The step is that of a model that computes this loss itself."""
        results = []
        for accumulation, is_inside in ((1, True), (1, False), (2, False)):
            torch.manual_seed(3)
            model = make_training(routed_kind, linear=True)
            own = (
                precise_loss if is_inside else (lambda outputs, labels, **k: precise_loss(outputs.logits, labels, **k))
            )
            trainer = make_trainer(model, step, accumulation, cls=RegularizedTrainer)
            trainer.compute_loss_func = None if is_inside else own
            trainer.train()
            results.append(copy.deepcopy(model.state_dict()))
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=1e-11, atol=1e-13)

    def test_label_smoothing_is_fine_for_a_dense_model(self, make_training, make_trainer, step):
        make_trainer(make_training("dense"), step, label_smoothing_factor=0.1).train()

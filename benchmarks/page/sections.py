"""One section a benchmark: its title, what is compared, and what makes its tables and figures."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.suite.compose import BASE

from . import adapters, ahead, compiled, layers, presets, tables, traffic
from .tables import Figures, Result

INTRODUCTION = """\
# Benchmarks

<!-- Generated from benchmarks/results by `python -m benchmarks page`. -->

What is compared at a point runs in turn, round by round, in one process, after the tests of what is timed have passed.
Times are medians over rounds. A ratio is the median over rounds of one call's time over another's in the same round,
with quartiles in brackets: below 1 the first is the quicker. The floor is the least time that the work can take: bytes
that have to move over the measured rate of a large copy, or operations of the matrix products over the measured rate
of a square product, whichever is longer. Weights that stay in a cache between rounds move faster than that, so that a
small call can fall below its floor. Each table names Dense and the floor first and the published formulation last: it
normalises both banks in each call, gathers tokens x K x d rows of each and forms M x M Gram matrices.

`torchdsc bench` measures everything again and `torchdsc bench --base COMMIT` compares with another commit."""


@dataclass(frozen=True)
class Section:
    """A benchmark's place on the page.

    Attributes:
        title: Heading.
        paragraph: What is compared, and how.
        tables: Markdown of its result.
        figures: Its figures.
    """

    title: str
    paragraph: str
    tables: Callable[[Result], list[str]]
    figures: Callable[[Result], Figures]


SECTIONS = {
    "layer": Section(
        "The layer",
        "One feed-forward layer of the paper's size (d 384, M 1523, K 4, static width 327) against layers of as many "
        "parameters: Dense of width 2611, five experts of 545 with two active on each of transformers' kernels, and a "
        "mixture of 1523 rank-1 LoRAs beside the same static layer. The floor is here timed as well: the router's and "
        "the static layer's matrix products, and nothing else. Training is a forward and backward pass with the "
        "regularisers, where the frame term, which needs no data, is paid in each step.",
        layers.tables,
        layers.figures,
    ),
    "recommended": Section(
        "The layer as recommended",
        "DSC of the preset `best` (K 32, without frame term; its router sees three embeddings, its input four, and "
        "mixing them counts) at the sizes of the studies (d 128, M 575) and of the paper (d 384, M 1551), against "
        "layers of as many parameters: Dense, five experts with two active, nine with three active beside a shared "
        "one, both on the fastest of transformers' kernels that was timed, and DSC as the paper has it.",
        layers.recommended_tables,
        lambda result: {},
    ),
    "routers": Section(
        "Routers",
        "A low-rank router (rank d / 4) and product keys (one head, queries of d / 2 features) in the layer of the "
        "paper's size, and product keys alone over banks of a thousand to a million atoms. In training with a million "
        "atoms gradients of the bank are row-sparse and the frame term is estimated from 1,024 of its rows.",
        tables.router_tables,
        tables.router_figures,
    ),
    "traffic": Section(
        "Traffic",
        "The DSC layer alone as d and M grow in the paper's proportion (M 3.97 d, K 4), by its router: low-rank of d / "
        "4, product keys of one head and d / 2 features, n-grams of four orders. Counted are the bytes of parameters "
        "that a forward pass in float32 has to read: the router's, and the selected rows of both banks, each once. "
        "The time is that of the forward pass.",
        traffic.tables,
        lambda result: {},
    ),
    "ahead": Section(
        "Routing ahead",
        "DSCGPT with the recommended settings at the paper's width (d 384, 6 layers, M 1551, K 32, static width "
        "281, vocabulary 4,096). Its routers see the embeddings of the last three tokens alone. So all routings may "
        "be made before the first block (`ahead`, which DSCGPT does), in each block, in one product of the routers' "
        "stacked weights, or once for each trigram and looked up from then on. The n-gram cache is a prototype: a "
        "dictionary of trigrams and tables of indices and coefficients. It has seen all, half or none of the "
        "trigrams of a call; it computes and stores the others. Half is every other token, or with 8 sequences "
        "every other sequence. Prefill fills a cache of keys and values, decoding goes on from one. Training is a "
        "step with activation checkpointing, which computes what is in a block twice.\n\n"
        "Routing ahead is kept: it saves the second computation in checkpointed training, and in inference, where "
        "the work is the same, it costs nothing. One product is not: it is slower in a long prefill, gains a tenth "
        "at most in decoding, and needs the weights of all routers a second time. An n-gram cache is not kept "
        "either. Within a text few trigrams come again. After a million tokens of other text half of them have been "
        "seen, which saves about a tenth of a long prefill or of a step for one sequence, and nothing in decoding "
        "eight: a batch reads all router weights as soon as one of its sequences needs them. For that the tables "
        "take many times the model's own memory, and are void once its weights change.",
        ahead.tables,
        lambda result: {},
    ),
    "model": Section(
        "Whole models",
        "Models of the paper's sizes (d 384, 6 layers, 6 heads, vocabulary 50,304) with random weights: a forward pass "
        "over 256 tokens without gradients, and greedy decoding of 32 tokens after a prompt of 64 through "
        "`generate()`, whose time is given per new token with the prompt's pass in it. The published formulation is "
        "the DSC model with its feed-forward layers replaced. The floor reads each weight in use once a pass.",
        tables.model_tables,
        tables.model_figures,
    ),
    "sparse": Section(
        "A sparse bank in whole models",
        "Models of the preset `sparse`, as the first trial of each variant has them. All use as many parameters for a "
        "token, and store sixteen times as many, with two exceptions: `Gated dense` stores what it uses, and `Gated "
        "dense, as many stored` uses what it stores. A forward pass in evaluation, and a whole step of training: "
        "forward, backward, clipping and the optimizer, which moves every stored parameter, however few tokens a step "
        "has. The preset trains in bfloat16 on 64 sequences a step; this is float32 and eight, the same in each round. "
        "Their tokens are random, so that few n-grams, and few rows of banks and tables, come twice.",
        presets.tables,
        lambda result: {},
    ),
    "sparse_ratios": Section(
        "Banks of other ratios in whole models",
        "The same for the preset `sparse-ratios` (d 64): variants are named by the ratio of stored to active ones. "
        "`Gated dense of the same step time` is as wide as makes a step of training take about as long as that of DSC.",
        presets.tables,
        lambda result: {},
    ),
    "ablations": Section(
        "Parts of the paper's layer in whole models",
        "The same for the preset `ablations` (d 64, 4 layers, M 256): one thing changed at a time, K among them.",
        presets.tables,
        lambda result: {},
    ),
    "adapters": Section(
        "Adapters",
        "A causal LM of SmolLM2-135M's sizes (d 576, 30 layers, vocabulary 49,152; weights are random, which costs "
        "the same time) with adapters of about as many parameters: LoRA of rank 8 in all linear layers, DSC (K 4) "
        "beside attention blocks and MLPs, beside whole layers, and by n-grams, also in six layers alone (K 16). A "
        "merged LoRA is the base model, and costs nothing; a DSC adapter cannot be merged. Prefill fills a cache, "
        "decoding goes on from one of 64 tokens, a training step is a forward and backward pass. Of many adapters "
        "over one bank each has a low-rank router and a gamma alone, about as many parameters as LoRA of rank 2 in "
        "queries and values; a batch of eight sequences has an adapter for each, and a switch is `set_adapter`.",
        adapters.tables,
        lambda result: {},
    ),
    "diagnostics": Section(
        "Diagnostics",
        "A step of training around which the routed layers are measured (`torchdsc.diagnostics.Diagnostics`), over the "
        "same step without, for DSC of the presets `small` (d 128, 4 layers) and `paper` (d 384, 6 layers; vocabulary "
        "4,096). A measurement every 100 steps adds a hundredth of what is above 1.",
        tables.diagnostics_tables,
        lambda result: {},
    ),
    "memory": Section(
        "Memory",
        "Peak memory of a training step (forward, regularisers, backward) of the DSC layer alone, beyond weights and "
        "input, each step in fresh processes whose median counts. The published formulation is also computed by adding "
        "up the tensors that it keeps alive, since it need not fit; the smaller point shows how far that computation "
        "can be trusted.",
        tables.memory_tables,
        tables.memory_figures,
    ),
    "compose": Section(
        "The composition",
        "`torchdsc.ops.compose` by each implementation that runs on the device, against the published gathers. One "
        f"size at a time is varied around {', '.join(f'{size} {value}' for size, value in BASE.items())}, and the "
        "largest point is added. `dense` is the masked product over all M atoms, and `auto` is what a call gets "
        "without asking.",
        tables.compose_tables,
        tables.compose_figures,
    ),
    "crossover": Section(
        "What auto takes",
        "The masked product costs tokens x M whatever K is, the gathered one tokens x K: from some share K / M on, the "
        'masked one is the quicker, forward and backward together. `impl="auto"` follows these measurements, nearest '
        "point first.",
        tables.crossover_tables,
        tables.crossover_figures,
    ),
    "select": Section(
        "Selection",
        "`torchdsc.ops.select` takes top-K and the statistics of the regularisers in one pass over the logits; the "
        "plain formulation clamps, takes top-K, softmax and logsumexp one after another. Top-K alone is what inference "
        "does.",
        tables.select_tables,
        tables.select_figures,
    ),
    "compiled": Section(
        "Compiled functions",
        "Each function in C against the tensor operations that take its place where it was not built, and against what "
        "`torch.compile` makes of those, or of the equation: as users meet them, so that training is a forward and a "
        "backward pass. A short convolution is also held against `conv1d` and, in training, against the quickest "
        "gradient of tensor operations that was found; screening against the same product in float32 with the compiled "
        "top-K. The child process that measures without AVX-512 sets `ATEN_CPU_CAPABILITY=avx2`, which the compiled "
        "functions follow, and the like for matrix products.",
        compiled.tables,
        lambda result: {},
    ),
}

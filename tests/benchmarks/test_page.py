"""The page is what the committed results give, and nothing else."""

import importlib.util
import json
import re
from pathlib import Path

import matplotlib
import pytest

from benchmarks.page import render, write
from benchmarks.page.sections import SECTIONS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
TEXT = (DOCS / "benchmarks.md").read_text(encoding="utf-8")


def load_made_up():
    spec = importlib.util.spec_from_file_location("made_up", Path(__file__).with_name("made_up.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MADE_UP = load_made_up()


@pytest.fixture
def put(tmp_path):
    """Writes results into a folder."""

    def put(**results):
        for name, result in results.items():
            (tmp_path / f"{name.replace('_on_', '-')}.json").write_text(json.dumps(result))
        return tmp_path

    return put


def section(text, title):
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def tables(text):
    """Tables as lists of rows of cells."""
    lines = [re.findall(r"(?<=\| )[^|]*?(?= \|)", line) if line.startswith("|") else None for line in text.splitlines()]
    found, current = [], []
    for line in [*lines, None]:
        if line is not None:
            current.append(line)
        elif current:
            found.append([current[0], *current[2:]])
            current = []
    return found


class TestCommitted:
    def test_page(self):
        assert render(ROOT / "benchmarks" / "results")[0] == TEXT

    def test_figures(self):
        figures = render(ROOT / "benchmarks" / "results")[1]
        assert {path.name for path in (DOCS / "figures").glob("bench-*.svg")} == set(figures)
        for name, svg in figures.items():
            committed = (DOCS / "figures" / name).read_text(encoding="utf-8")
            # Another release of matplotlib writes other bytes for the same figure.
            if f"Matplotlib v{matplotlib.__version__}," in committed:
                assert svg == committed, name


class TestWithoutResults:
    def test_says_so(self, tmp_path):
        text, figures = render(tmp_path)
        assert figures == {}
        for name, part in SECTIONS.items():
            assert f"Not measured yet: `torchdsc bench {name}`." in section(text, part.title)

    def test_of_an_older_form_are_none(self, put):
        old = {"benchmark": "layer", "rows": [{"tokens": 1, "kind": "forward"}]}
        assert "Not measured yet: `torchdsc bench layer`." in render(put(layer=old))[0]


class TestMeasured:
    def test_each_section_has_its_figures(self, put):
        text, figures = render(put(**{name: make() for name, make in MADE_UP.ALL.items()}))
        assert "Not measured" not in text
        assert re.findall(r"!\[[^\]]+\]\(figures/(.*?)\)", text) == list(figures)
        assert set(MADE_UP.ALL) == set(SECTIONS)
        for name, svg in figures.items():
            assert svg.startswith("<?xml")
            assert len(svg) < 150_000, name

    def test_compiled_functions_stand_with_and_without_avx512(self, put):
        text = section(render(put(compiled=MADE_UP.compiled()))[0], "Compiled functions")
        heading = "| function | sizes | threads | ms | over tensor operations | over torch.compile |"
        first, second = text.split("Without AVX-512, on the same processor:")
        assert heading in first
        assert "| gate, inference | tokens 1, K 4 | 1 | 1.00 | 0.50 [0.47, 0.54] | 0.25 [0.24, 0.27] |" in first
        assert "| gate, inference | tokens 1, K 4 | 2 | 1.00 | 0.50 [0.47, 0.54] | - |" in first
        assert "| gate, inference | tokens 1, K 4 | 1 | 1.00 | 1.25 [1.19, 1.35] |" in second

    def test_adapters_have_their_time_over_that_of_lora(self, put):
        text = section(render(put(adapters=MADE_UP.adapters()))[0], "Adapters")
        assert "| prefill of 32 tokens, over merged lora | switch, over lora |" in text
        assert "| dsc | 900 | 1.50 [1.39, 1.58] | - |" in text
        assert "| dsc over one bank | 50 | - | 0.25 [0.23, 0.26] |" in text

    def test_same_bytes_again(self, put):
        folder = put(layer=MADE_UP.layer(), crossover=MADE_UP.crossover())
        assert render(folder) == render(folder)

    def test_hardware_command_and_commit(self, put):
        text = section(render(put(select=MADE_UP.select()))[0], "Selection")
        assert "*A processor, 2 threads; torch 2.0, float32; a copy moves 21.0 GB/s, a matrix product runs at" in text
        assert "Commit 0123456789ab, 2026-01-02, `torchdsc bench select`.*" in text
        smoke = {**MADE_UP.select(), "quick": True}
        assert "A smoke run: its figures mean nothing.*" in render(put(select=smoke))[0]

    def test_a_gpu_has_its_own_tables_and_figures(self, put):
        gpu = {**MADE_UP.select(), "device": "cuda"}
        gpu["hardware"] = {"cpu": "A processor", "threads": 2, "gpu": "A GPU"}
        text, figures = render(put(select=MADE_UP.select(), select_on_cuda=gpu))
        assert list(figures) == ["bench-select.svg", "bench-select-cuda.svg"]
        assert section(text, "Selection").index("*A processor") < section(text, "Selection").index("*A GPU;")

    def test_write_removes_figures_of_before(self, put, tmp_path):
        docs = tmp_path / "docs"
        (docs / "figures").mkdir(parents=True)
        (docs / "figures" / "bench-gone.svg").write_text("")
        (docs / "figures" / "other.svg").write_text("")
        write(put(crossover=MADE_UP.crossover()), docs)
        assert {path.name for path in (docs / "figures").iterdir()} == {"bench-crossover.svg", "other.svg"}
        assert (docs / "benchmarks.md").read_text() == render(tmp_path)[0]


class TestTables:
    def test_layer(self, put):
        [table] = tables(section(render(put(layer=MADE_UP.layer()))[0], "The layer"))
        assert table[0][1:3] == ["over Dense", "over the floor, timed"]
        assert table[0][-1] == "over published"
        first = dict(zip(table[0], table[1], strict=True))
        assert first["tokens, pass"] == "1, forward"
        assert first["over Dense"] == "0.67 [0.63, 0.72]"
        # The fastest of the kernels, by name.
        assert first["over the fastest MoE"] == "1.11 [1.06, 1.20] grouped_mm"
        assert first["over published"] == "0.40 [0.38, 0.43]"
        assert first["floor, computed"] == "50%"
        assert len(table) == 7

    def test_recommended(self, put):
        text = section(render(put(recommended=MADE_UP.recommended()))[0], "The layer as recommended")
        [table] = tables(text)
        first = dict(zip(table[0], table[1], strict=True))
        assert first["over Dense"] == "0.50 [0.47, 0.54]"
        # Each MoE by its own fastest kernel.
        assert first["over MoE"] == "0.80 [0.76, 0.86] eager"
        assert first["over MoE, one shared"] == "2.00 [1.90, 2.16] grouped_mm"
        assert "*A processor, 2 threads;" in text
        assert "Instructions that torch uses: AVX2." in text
        assert "auto" not in text

    def test_recommended_of_before_kernels_were_named(self, put):
        times = {"dense": 2.0, "moe": 1.25, "moe, one shared": 1.0, "dsc": 0.8, "recommended": 1.0}
        point = {"tokens": 64, "kind": "forward", "d": 128, "M": 575, "K": 32}
        old = MADE_UP.result("recommended", [MADE_UP.row(point, "recommended", times)])
        text = section(render(put(recommended=old))[0], "The layer as recommended")
        assert tables(text)[0][1][3:5] == ["0.80 [0.76, 0.86] auto", "1.00 [0.95, 1.08] auto"]
        assert "on a CPU the eager loop over experts" in text

    def test_ahead(self, put):
        ways, shares = tables(section(render(put(ahead=MADE_UP.ahead()))[0], "Routing ahead"))
        assert ways[0] == ["", "ahead, ms", "over in each block", "over one product", "over n-grams, half seen"]
        assert ways[1] == ["decode, 1 x 64", "4.00", *self.spreads(4 / 4.2, 4 / 4.4, 4 / 3.6)]
        # Caches are for inference.
        assert ways[2] == ["training, 8 x 128", "2,000", *self.spreads(2000 / 2200), "-", "-"]
        assert shares[1:] == [["64", "0", "0", "0", "5%"], ["1,024", "1,000,000", "500,000", "1,099", "50%"]]

    @staticmethod
    def spreads(*ratios):
        return [f"{ratio:.2f} [{0.95 * ratio:.2f}, {1.08 * ratio:.2f}]" for ratio in ratios]

    def test_ahead_without_real_text(self, put):
        text = section(render(put(ahead={**MADE_UP.ahead(), "trigrams_seen": []}))[0], "Routing ahead")
        assert len(tables(text)) == 1

    def test_model(self, put):
        times, shares = tables(section(render(put(model=MADE_UP.model()))[0], "Whole models"))
        assert times[0][1:4] == ["Dense", "floor", "DSC"]
        assert times[0][-2:] == ["published", "floor reached"]
        assert times[1][1:4] == ["180", "90.0", "150"]
        # The floor is given per new token too.
        assert times[3][:4] == ["generate 32 after 64, per token", "10.8", "4.00", "9.00"]
        # What was left out is neither fast nor slow.
        assert times[2][times[0].index("MoE (batched_mm)")] == "-"
        assert shares[0][1] == "Dense"
        assert shares[0][-1] == "published"

    def test_presets(self, put):
        text = section(render(put(sparse=MADE_UP.sparse()))[0], "A sparse bank in whole models")
        [table] = tables(text)
        assert table == [
            ["variant", "stored, M", "active, M", "forward pass, 8 x 128", "training step, 8 x 128"],
            ["DSC by n-grams", "18.90", "1.178", "-", "-"],
            ["Gated dense", "1.18", "1.177", *self.spreads(2, 8)],
            # By the fastest kernel of each point.
            ["MoE", "18.91", "1.177", "1.20 [1.14, 1.30] eager", "1.20 [1.14, 1.30] grouped_mm"],
        ]
        assert "the time of DSC by n-grams over that of the variant" in text
        assert "Instructions that torch uses: AVX2." in text
        assert "Left out at some points: MoE (batched_mm) (gathers whole experts for every token)." in text
        assert "*A processor, 2 threads;" in text

    def test_compose(self, put):
        [table] = tables(section(render(put(compose=MADE_UP.compose()))[0], "The composition"))
        assert table[0][5:9] == ["dense", "floor", "gather", "published"]
        # Around the middle 1 + 3 + 1 + 2 + 1 points, and the largest; twice.
        assert len(table) == 1 + 2 * 9
        assert table[9][:5] == ["forward", "4096", "16384", "64", "1024"]
        assert table[9][8] == "-"

    def test_memory(self, put):
        text = section(render(put(memory=MADE_UP.memory()))[0], "Memory")
        [table] = tables(text)
        assert table[1] == ["1,024", "1,024", "4,096", "16", "170", "3.3", "536", "560"]
        assert table[2][4:] == ["2,048", "15.0", "30,720", "-"]
        assert "gathered rows 15,360, Gram matrices 15,360 MiB" in text

    def test_crossover(self, put):
        [table] = tables(section(render(put(crossover=MADE_UP.crossover()))[0], "What auto takes"))
        assert table[1] == ["16", "512", "64", "0.011"]
        assert table[2] == ["16", "512", "384", "never"]

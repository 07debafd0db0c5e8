"""Results as the runner writes them, with made-up times at the real points."""

from itertools import product

GATHERS = {"MoE (batched_mm)": "gathers whole experts for every token"}
CEILINGS = {"copy_bytes_per_second": 2.1e10, "product_operations_per_second": 1.5e11}


def result(name, rows, **more):
    return {
        **{"schema": 1, "benchmark": name, "description": name, "command": f"torchdsc bench {name}"},
        **{"date": "2026-01-02T03:04:05+00:00", "commit": "0123456789abcdef", "versions": {"torch": "2.0"}},
        **{"hardware": {"cpu": "A processor", "threads": 2}, "device": "cpu", "quick": False, "rounds": None},
        **{"ceilings": CEILINGS, "rows": rows, **more},
    }


def row(point, subject, times, *, floor=None, per=1, unit="ms", left_out=None):
    def spread(value):
        return {"q1": 0.95 * value, "median": value, "q3": 1.08 * value}

    calls = {
        name: {"ms": spread(value), "subject_over_it": spread(times[subject] / value), "extra_bytes": 2**20}
        for name, value in times.items()
    }
    made = {"point": point, "unit": unit, "subject": subject, "rounds": 9, "calls": calls, "left_out": left_out or {}}
    if floor is not None:
        made["floor"] = {"bytes": 1, "operations": 1, "copy_ms": floor, "product_ms": 0.0, "ms": floor * per}
        made["floor"] |= {"achieved": floor / times[subject], "per": per}
    return made


def compose():
    rows = []
    for d, m, k, tokens in product((384, 1024), (1523, 16384), (4, 16, 64), (1, 64, 1024, 4096)):
        for kind, factor in (("forward", 1), ("forward+backward", 4)):
            pairs = tokens * k * d * 1e-6 * factor
            times = {"dense": 0.05 + tokens * m * d * 4e-8 * factor, "gather": 0.03 + pairs}
            left_out = {}
            if pairs * 4 < 1000:
                times["published"] = 0.1 + m * d * 1e-6 + 4 * pairs
            else:
                left_out["published"] = "too large"
            point = {"tokens": tokens, "M": m, "K": k, "d": d, "kind": kind}
            rows.append(row(point, "gather", times, floor=0.001 + pairs / 3, left_out=left_out))
    return result("compose", rows)


def layer():
    factors = {"dense": 1.5, "floor": 0.6, "moe (eager)": 1.1, "moe (grouped_mm)": 0.9, "moe (batched_mm)": 1.4}
    factors |= {"dsc": 1, "mixture_of_loras": 1.02, "published": 2.5}
    rows = []
    for tokens, kind in product((1, 256, 4096), ("forward", "forward+backward")):
        own = (0.4 + tokens * 0.01) * (1 if kind == "forward" else 4)
        times = {name: own * factor for name, factor in factors.items() if tokens == 1 or "batched" not in name}
        point = {"tokens": tokens, "kind": kind, "d": 384, "M": 1523, "K": 4}
        left_out = {} if tokens == 1 else {"moe (batched_mm)": "gathers whole experts for every token"}
        rows.append(row(point, "dsc", times, floor=own / 2, left_out=left_out))
    return result("layer", rows)


def recommended():
    rows = []
    for d, kind in product((128, 384), ("forward", "forward+backward")):
        times = {"dense": 2.0, "moe (eager)": 1.25, "moe (grouped_mm)": 1.6, "dsc": 0.8, "recommended": 1.0}
        times |= {"moe, one shared (eager)": 1.0, "moe, one shared (grouped_mm)": 0.5}
        rows.append(row({"tokens": 4096, "kind": kind, "d": d, "M": 4 * d, "K": 16}, "recommended", times))
    return result("recommended", rows, instructions="AVX2")


def routers():
    rows = []
    for kind, factor in (("forward", 1), ("forward+backward", 4)):
        for router in ("low_rank", "product_key"):
            point = {"router": router, "tokens": 4096, "M": 1521, "kind": kind}
            times = {"dense": 100, router: 30, "linear": 40, "published": 80}
            rows.append(row(point, router, {name: factor * time for name, time in times.items()}))
        point = {"router": "product_key", "tokens": 4096, "M": 1 << 20, "kind": kind}
        times = {str(1 << power): factor * (5 + power) for power in (10, 14, 18, 20)}
        rows.append(row(point, str(1 << 20), times))
    return result("routers", rows)


def ahead():
    times = {"in each block": 4.2, "ahead": 4.0, "one product": 4.4, "n-grams, half seen": 3.6}
    decoding = row({"kind": "decode", "batch": 1, "tokens": 64}, "ahead", times, per=16, unit="ms per new token")
    times = {"in each block": 2200, "ahead": 2000}
    training = row({"kind": "training", "batch": 8, "tokens": 128}, "ahead", times)
    shares = [
        {"before": 0, "stored": 0, "tokens": 64, "share": 0.05},
        {"before": 1_000_000, "stored": 500_000, "tokens": 1024, "share": 0.5},
    ]
    return result("ahead", [decoding, training], bytes_a_trigram=2304, trigrams_seen=shares)


def model():
    factors = {"dense": 1.2, "dsc": 1, "moe (eager)": 1.1, "moe (grouped_mm)": 0.95, "moe (batched_mm)": 3.0}
    factors |= {"published": 1.6}
    prefills = [
        row(
            {"kind": "prefill", "batch": batch, "tokens": 256},
            "dsc",
            {name: 150 * batch * f for name, f in factors.items() if batch == 1 or "batched" not in name},
            floor=90.0 * batch,
            left_out={} if batch == 1 else {"moe (batched_mm)": "too large"},
        )
        for batch in (1, 8)
    ]
    decoding = {"kind": "generate", "batch": 1, "tokens": 64, "new": 32}
    times = {name: 9 * factor for name, factor in factors.items()}
    return result("model", [*prefills, row(decoding, "dsc", times, floor=4.0, per=32, unit="ms per new token")])


def sparse():
    parameters = {
        "DSC by n-grams": {"stored": 18_899_200, "active": 1_177_856},
        "Gated dense": {"stored": 1_177_344, "active": 1_177_344},
        "MoE": {"stored": 18_905_856, "active": 1_177_344},
    }
    times = {"DSC by n-grams": 60, "Gated dense": 30, "MoE (eager)": 50, "MoE (grouped_mm)": 75}
    forward = row({"kind": "forward", "batch": 8, "tokens": 128}, "DSC by n-grams", times, left_out=GATHERS)
    times |= {"DSC by n-grams": 240, "MoE (eager)": 2400, "MoE (grouped_mm)": 200}
    training = row({"kind": "training", "batch": 8, "tokens": 128}, "DSC by n-grams", times, left_out=GATHERS)
    return result("sparse", [forward, training], instructions="AVX2", parameters=parameters)


def sparse_ratios():
    return {**sparse(), "benchmark": "sparse_ratios"}


def ablations():
    return {**sparse(), "benchmark": "ablations"}


def traffic():
    rows, counted = [], []
    for width, tokens in product((96, 192), (1, 4096)):
        times = {"linear": 0.02 * width * tokens**0.5, "ngram": 0.01 * width * tokens**0.5}
        rows.append(row({"d": width, "tokens": tokens}, "linear", times))
        for router in times:
            router_bytes = 16 * width * width if router == "linear" else 0
            point = {"d": width, "M": 4 * width, "router": router, "tokens": tokens}
            counted.append(point | {"router": router, "router_bytes": router_bytes, "atom_bytes": 32 * width})
    return result("traffic", rows, counted=counted)


def adapters():
    rows = [
        row({"kind": "prefill", "batch": 1, "tokens": 32}, "merged lora", {"merged lora": 2.0, "dsc": 3.0}),
        row({"kind": "switch", "batch": 1, "tokens": 0}, "lora", {"lora": 4.0, "dsc over one bank": 1.0}),
    ]
    return result("adapters", rows, parameters={"lora": 1000, "dsc": 900, "dsc over one bank": 50})


def diagnostics():
    times = {"step with a measurement": 1.2, "step": 1.0}
    point = {"model": "small", "batch": 12, "tokens": 128}
    return result("diagnostics", [row(point, "step with a measurement", times)])


def memory():
    def made(point, own, computed, measured):
        calls = {"dsc": {"bytes": own, "subject_over_it": 1.0}}
        left_out = {}
        if measured is None:
            left_out["published"] = "would take 30.0 GiB of the 20.0 GiB that are available: computed"
        else:
            calls["published"] = {"bytes": measured, "subject_over_it": own / measured}
        terms = {"gathered rows": computed // 2, "Gram matrices": computed - computed // 2}
        return {
            **{"point": point, "unit": "bytes", "subject": "dsc", "calls": calls, "left_out": left_out},
            "computed": {"published": {"bytes": computed, "terms": terms}},
        }

    small = {"tokens": 1024, "d": 1024, "M": 4096, "K": 16}
    large = {"tokens": 8192, "d": 1024, "M": 16384, "K": 64}
    return result("memory", [made(small, 170 << 20, 536 << 20, 560 << 20), made(large, 2 << 30, 30 << 30, None)])


def select():
    rows = []
    for tokens, m, k in product((1, 256, 4096), (1523, 16384), (4, 64)):
        for kind, factor in (("forward", 1), ("forward+backward", 3)):
            own = (0.02 + tokens * m * 2e-6) * factor
            times = {"topk alone": own / 2, "select": own, "published": 1.8 * own}
            rows.append(row({"tokens": tokens, "M": m, "K": k, "kind": kind}, "select", times, floor=own / 3))
    return result("select", rows)


def compiled():
    times = {"compiled": 1.0, "tensor operations": 2.0}
    points = [{"function": "gate", "pass": "inference", "threads": threads, "tokens": 1, "K": 4} for threads in (1, 2)]
    made = [
        row(points[0], "compiled", {**times, "torch.compile": 4.0}),
        row(points[1], "compiled", times, left_out={"torch.compile": "with one thread alone"}),
    ]
    return result("compiled", made, without_avx512=[row(points[0], "compiled", {**times, "tensor operations": 0.8})])


def crossover():
    ratios = iter((0.011, 2.0, 0.119, 2.0, 0.079, 0.3, 0.06, 0.25, 0.05, 0.22, 0.04, 0.2))
    points = [
        {"tokens": tokens, "atoms": atoms, "width": width, "ratio": next(ratios)}
        for tokens, atoms, width in product((16, 256, 4096), (512, 4096), (64, 384))
    ]
    return result("crossover", [], crossovers=points)


ALL = {
    function.__name__: function
    for function in (
        layer,
        recommended,
        routers,
        ahead,
        model,
        sparse,
        sparse_ratios,
        ablations,
        adapters,
        diagnostics,
        traffic,
        memory,
        compose,
        crossover,
        select,
        compiled,
    )
}

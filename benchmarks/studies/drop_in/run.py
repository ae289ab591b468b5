"""`python -m benchmarks.studies.drop_in`: the drop-in's error and seconds beside SDPA's.

Under two minutes on one core. Writes `results/drop-in.json`, of which `python -m benchmarks.readme`
makes the tables of docs/kernels.md.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn.functional import interpolate, scaled_dot_product_attention

from stem_kernels import attention_error, stem_attention
from stem_kernels.info import provenance
from stem_kernels.ops.stem_attention import exact_is_cheaper
from stem_kernels.testing import clustered_tokens

from ... import records

OUT = records.RESULTS / "drop-in.json"
SIDE, HEADS, DIM = 64, 8, 40
TOKENS = SIDE**2
NUM_ITERS = 2
SAMPLED: dict[str, Any] = {"sample_per_base": 22, "calibration": "moments"}
ALL_TOKENS: dict[str, Any] = {"sample_per_base": None, "calibration": "none"}
FORMS: dict[str, dict[str, Any]] = {
    **{f"K={num_bases}": {"num_bases": num_bases, **SAMPLED} for num_bases in (64, 256, 512)},
    "K=256, all tokens": {"num_bases": 256, **ALL_TOKENS},
    "K=256, joint": {"num_bases": 256, "sample_per_base": 22, "calibration": "joint"},
}
"""What is compared, by what the tables call it: options of `stem_attention`."""
LARGE_SIDE = 128
LARGE_FORMS = ("K=256", "K=256, all tokens", "K=256, joint")
TIMED_TOKENS = (1024, 4096, 16384)
ROUNDS = 3

Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def projected(features: torch.Tensor) -> Layer:
    """Query, key and value [1, h, n, d]: three random projections of features [1, n, C], as in a
    layer. Where features have a variance of 1, logits do."""
    channels = features.shape[-1]
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(3, channels, HEADS * DIM, generator=generator) / channels**0.5
    query, key, value = (features @ weights).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
    return query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)


def unlike(tokens: int = TOKENS) -> Layer:
    """Standard normal query, key and value."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, HEADS, tokens, DIM, generator=generator)
    return query, key, value


def clusters(count: int, spread: float) -> Layer:
    """Features around `count` standard normal centres, `spread` times a standard normal away."""
    shape = (1, TOKENS, HEADS * DIM)
    return projected(clustered_tokens(shape, num_clusters=count, spread=spread))


def smooth(detail: int, sharpness: float = 1.0, side: int = SIDE) -> Layer:
    """Features of a map that is random at every `detail`-th place and bicubic in between."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, HEADS * DIM, side // detail, side // detail, generator=generator)
    fine = interpolate(coarse, size=side, mode="bicubic").flatten(2).mT
    query, key, value = projected(fine / fine.std())
    return sharpness * query, key, value


KINDS: dict[str, Callable[[], Layer]] = {
    "every key unlike all others (standard normal)": unlike,
    **{
        f"{count} clusters, {spread} wide": partial(clusters, count, spread)
        for count in (16, 64, 256, 1024)
        for spread in (0.1, 0.5)
    },
    **{
        f"smooth map, new every {detail} places": partial(smooth, detail)
        for detail in (4, 8, 16, 32)
    },
    "smooth map, new every 16 places, logits x 4": partial(smooth, 16, 4.0),
}
"""What attention is tried on, by what the tables call it."""
LARGE_KINDS = {
    f"smooth map, new every {detail} places": partial(smooth, detail, side=LARGE_SIDE)
    for detail in (8, 16, 32, 64)
}
"""The same of LARGE_SIDE^2 tokens."""


def measure() -> dict[str, Any]:
    """All figures: errors by kind of keys, and seconds by number of tokens."""
    errors = _errors(KINDS, FORMS)
    large = _errors(LARGE_KINDS, LARGE_FORMS)
    seconds: dict[int, dict[str, float]] = {}
    for tokens in TIMED_TOKENS:
        layer = unlike(tokens)
        seconds[tokens] = {"sdpa": _seconds(scaled_dot_product_attention, layer)}
        for form, options in FORMS.items():
            attention = partial(stem_attention, num_iters=NUM_ITERS, allow_exact=False, **options)
            seconds[tokens][form] = _seconds(attention, layer)
        print(tokens, seconds[tokens])
    return {
        "tokens": TOKENS,
        "heads": HEADS,
        "dim": DIM,
        "provenance": provenance(),
        "errors": errors,
        "large_errors": large,
        "seconds": seconds,
    }


def _errors(kinds: Mapping[str, Callable[[], Layer]], forms: Iterable[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, make in kinds.items():
        layer = make()
        found[kind] = {
            form: attention_error(
                *layer, num_iters=NUM_ITERS, allow_exact=False, **FORMS[form]
            )._asdict()
            for form in forms
        }
        print(kind, {form: row["overall"] for form, row in found[kind].items()}, flush=True)
    return found


def _seconds(attention: Callable[..., torch.Tensor], layer: Layer) -> float:
    # One thread's CPU time: what else the machine does counts for little.
    taken = []
    for _ in range(1 + ROUNDS):
        begin = time.process_time()
        attention(*layer)
        taken.append(time.process_time() - begin)
    return statistics.median(taken[1:])


def table(results: dict[str, Any]) -> str:
    """The Markdown of the errors and of the times."""
    where, path = results["provenance"], f"benchmarks/results/{OUT.name}"
    head = " | ".join(FORMS)
    lines = [
        f"Source: [{path}]({path}) ({where['cpu']}, {where['threads']} thread, "
        f"torch {where['versions']['torch']}, commit `{where['commit']}`). One layer of "
        f"{results['heads']} heads of {results['dim']} channels, float32, every option but K at "
        'its default (EM on 22 tokens a base, moments) but for "all tokens", where EM reads all '
        'and nothing is corrected, and "joint". But in the first row query, key and value are '
        "projections of one map of features. A cluster is so wide beside the distance of centres "
        "from their mean; a smooth map is random at every such place and bicubic in between.",
        "",
        f"| off SDPA (worst head), {results['tokens']} tokens | {head} |",
        "|---" * (1 + len(FORMS)) + "|",
    ]
    lines += _error_rows(results["errors"])
    lines += [
        "",
        f"| off SDPA (worst head), {LARGE_SIDE**2} tokens | {' | '.join(LARGE_FORMS)} |",
        "|---" * (1 + len(LARGE_FORMS)) + "|",
        *_error_rows(results["large_errors"]),
    ]
    lines += [
        "",
        f"| milliseconds of CPU time | SDPA | {head} |",
        "|---" * (2 + len(FORMS)) + "|",
    ]
    for tokens, row in results["seconds"].items():
        cells = [f"{1000 * row['sdpa']:.0f}"]
        for form, options in FORMS.items():
            count, sample = options["num_bases"], options["sample_per_base"]
            mark = exact_is_cheaper(
                int(tokens),
                int(tokens),
                results["dim"],
                results["dim"],
                num_bases=count,
                num_iters=NUM_ITERS,
                read=int(tokens) if sample is None else min(int(tokens), sample * count),
                corrected=options["calibration"] != "none",
                calibrating=256 if options["calibration"] == "joint" else 0,
            )
            cells.append(f"{1000 * row[form]:.0f}" + ("*" if mark else ""))
        lines.append(f"| {tokens} tokens | {' | '.join(cells)} |")
    lines += ["", "*: `stem_attention` calls SDPA there; the figure is `allow_exact=False`'s."]
    return "\n".join(lines) + "\n"


def _error_rows(errors: Mapping[str, Any]) -> list[str]:
    rows = []
    for kind, row in errors.items():
        cells = [f"{_percent(e['overall'])} ({_percent(e['worst_head'])})" for e in row.values()]
        rows.append(f"| {kind} | {' | '.join(cells)} |")
    return rows


def _percent(error: float) -> str:
    return f"{100 * error:.2g} %"


def main() -> None:
    """Measure on one thread, and write the results."""
    torch.set_num_threads(1)
    OUT.write_text(json.dumps(measure(), indent=1) + "\n")

"""`python -m benchmarks.readme`: write the README's tables of measurements from results files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stem.inversion import METHODS

from .drop_in import OUT as DROP_IN
from .drop_in import table as drop_in_table
from .layers import LAYER_KINDS
from .quality_report import table as study_table
from .quality_variants import CEILING

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = Path("benchmarks/results/cpu-2-cores.json")
QUALITY = Path("benchmarks/results/quality.json")
BEGIN = "<!-- {}: written by python -m benchmarks.readme -->\n"
END = "<!-- end of {} -->\n"


def table(results: dict[str, Any]) -> str:
    """The Markdown of the measurements, naming machine, versions and commit."""
    machine, rows = results["machine_info"], {row["name"]: row for row in results["benchmarks"]}
    em, memory = rows["test_time"], rows["test_memory"]
    extra, held = em["extra_info"], memory["extra_info"]
    lines = [
        f"Source: `{RESULTS}` ({machine['cpu']['brand_raw']}, {machine['threads']} cores, "
        f"torch {machine['torch']}, commit `{results['commit_info']['id'][:12]}`). Medians.",
        "",
        "| EM, R=5: B=8, n=32768, d=40, K=256, float32 | seconds | extra memory |",
        "|---|---|---|",
        f"| eager, divided before the product | {extra['eager_seconds']:.2f} "
        f"| {held['eager_extra_bytes'] / 2**20:.0f} MiB |",
        f"| eager, divided after the product | {extra['lean_eager_seconds']:.2f} | not measured |",
        f"| `soft_em`, torch backend | {em['stats']['median']:.2f} "
        f"| {held['extra_bytes'] / 2**20:.0f} MiB |",
        "",
        "| C++ extension against the torch backend, float32, K=256 | torch, ms | C++, ms | ratio |",
        "|---|---|---|---|",
        *(
            f"| {row['group']} | {1000 * row['extra_info']['torch_seconds']:.1f} "
            f"| {1000 * row['extra_info']['cuda_seconds']:.1f} "
            f"| {row['extra_info']['times_faster_than_torch']:.1f} |"
            for row in results["benchmarks"]
            if "times_faster_than_torch" in row["extra_info"]
        ),
        "",
        "| One self-attention layer with its projections, milliseconds | 16x16 | 32x32 | 64x64 |",
        "|---|---|---|---|",
    ]
    for kind in LAYER_KINDS:
        medians = [
            f"{1000 * rows[f'test_layer[{kind}-{side}]']['stats']['median']:.0f}"
            for side in (16, 32, 64)
        ]
        lines.append(f"| {kind} | {' | '.join(medians)} |")
    lines += [
        "",
        'N=4 frames, C=320, h=8, K=256, float32, backend "auto". On a GPU: not measured yet.',
    ]
    return "\n".join(lines) + "\n"


def quality_table(results: dict[str, Any]) -> str:
    """The Markdown of the methods' reconstructions in the quality study."""
    provenance = results["provenance"]
    measured = [row["commit"] for row in results["measured"].values()]
    commits = ", ".join(f"`{commit}`" for commit in dict.fromkeys(measured))
    lines = [
        f"Source: `{QUALITY}` ({provenance['cpu']}, torch {provenance['versions']['torch']}, "
        f"commit {commits}): {results['videos']}; "
        f"{results['pixels']}x{results['pixels']} pixels, {results['steps']} steps there and back. "
        "±: 95 % interval of the mean; against stem: of the differences video by video. Seconds "
        f"are those of one video on one thread, {results['processes']} videos at a time. "
        "Off all-frame attention: relative error of the self-attentions' outputs against those of "
        "attention over all frames on the same input. stem has `StemConfig()`'s defaults, paper is "
        "`StemConfig.paper()`.",
        "",
        study_table(results, (CEILING, *METHODS, "paper")),
    ]
    return "\n".join(lines)


TABLES: dict[str, tuple[Path, Callable[[dict[str, Any]], str]]] = {
    "measured": (RESULTS, table),
    "quality": (QUALITY, quality_table),
    "drop-in": (DROP_IN, drop_in_table),
}
"""By the name of their place in the README: file of results, and what is written from it."""


def updated(text: str) -> str:
    """The README's text with the tables of the committed results."""
    for name, (path, written) in TABLES.items():
        head, rest = text.split(BEGIN.format(name))
        _, tail = rest.split(END.format(name))
        results = json.loads((ROOT / path).read_text())
        text = f"{head}{BEGIN.format(name)}\n{written(results)}\n{END.format(name)}{tail}"
    return text


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))

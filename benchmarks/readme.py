"""`python -m benchmarks.readme`: write the README's tables of measurements from results files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from stem.inversion import METHODS

from . import records
from .bench import Row
from .drop_in import OUT as DROP_IN
from .drop_in import table as drop_in_table
from .em_cases import EAGER, LEAN_EAGER
from .layers import LAYER_KINDS
from .quality_report import table as study_table
from .quality_variants import CEILING
from .targets import COMPARED, EM, Rows

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = Path("benchmarks/results/cpu-2-cores.json")
QUALITY = Path("benchmarks/results/quality.json")
EM_CONTENDERS = {
    "eager, divided before the product": EAGER,
    "eager, divided after the product": LEAN_EAGER,
    "`soft_em`, torch backend": "torch",
}
BEGIN = "<!-- {}: written by python -m benchmarks.readme -->\n"
END = "<!-- end of {} -->\n"


def table(results: dict[str, Any]) -> str:
    """The Markdown of the measurements, naming machine, versions and commit."""
    where, rows = results["provenance"], Rows([Row(**row) for row in results["rows"]])
    lines = [
        f"Source: `{RESULTS}` ({where['cpu']}, {where['threads']} cores, "
        f"torch {where['versions']['torch']}, commit `{where['commit']}`). Medians.",
        "",
        f"| EM, {rows[EM, EAGER].shape}, float32 | seconds | extra memory |",
        "|---|---|---|",
    ]
    for name, contender in EM_CONTENDERS.items():
        extra = rows[EM, contender].extra_bytes
        held = "not measured" if extra is None else f"{extra / 2**20:.0f} MiB"
        lines.append(f"| {name} | {rows.seconds(EM, contender):.2f} | {held} |")
    lines += [
        "",
        "| C++ extension against the torch backend, float32 | torch, ms | C++, ms | ratio |",
        "|---|---|---|---|",
    ]
    for case in COMPARED:
        torch, cuda = (rows.seconds(case, name) for name in ("torch", "cuda"))
        lines.append(
            f"| {case}: {rows[case, 'cuda'].shape} | {1000 * torch:.1f} | {1000 * cuda:.1f} "
            f"| {torch / cuda:.1f} |"
        )
    lines += [
        "",
        "| One self-attention layer with its projections, milliseconds | 16x16 | 32x32 | 64x64 |",
        "|---|---|---|---|",
    ]
    for kind in LAYER_KINDS:
        medians = [rows.seconds(f"layer {side}x{side} N=4", kind) for side in (16, 32, 64)]
        lines.append(f"| {kind} | {' | '.join(f'{1000 * each:.0f}' for each in medians)} |")
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
        results = records.read(ROOT / path)
        text = f"{head}{BEGIN.format(name)}\n{written(results)}\n{END.format(name)}{tail}"
    return text


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))

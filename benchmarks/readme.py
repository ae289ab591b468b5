"""`python -m benchmarks.readme`: write the README's table of measurements from a results file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = Path("benchmarks/results/cpu-2-cores.json")
BEGIN = "<!-- measured: written by python -m benchmarks.readme -->\n"
END = "<!-- end of measured -->\n"


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
    for kind in ("per-frame", "all-frame", "stem R=5", "stem R=1"):
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


def updated(text: str) -> str:
    """The README's text with the table of the committed results."""
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    results = json.loads((ROOT / RESULTS).read_text())
    return f"{head}{BEGIN}\n{table(results)}\n{END}{tail}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))

"""`python -m benchmarks.readme`: write README's and docs' tables of measurements from results."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stem.inversion import METHODS
from stem.metrics import mean_interval
from stem.world import EDIT_KINDS

from . import records
from .cases.bench import Row
from .cases.case import dtype_name
from .cases.editing import PRODUCTS, TWO_SDPA
from .cases.em import EAGER, LEAN_EAGER
from .cases.layers import LAYER_KINDS
from .cases.operators import HALVES
from .counting.video_report import OUT as VIDEO_COUNTED
from .counting.video_report import table as video_counted_table
from .studies.drop_in.run import OUT as DROP_IN
from .studies.drop_in.run import table as drop_in_table
from .studies.editing.control import table as controlled_edits
from .studies.editing.report import values as editing_values
from .studies.editing.variants import BASELINE, OURS, UNEDITED, series_of
from .studies.editing.variants import CEILING as EXACT
from .studies.features.run import CLIP, SEEDS
from .studies.features.run import table as features_table
from .studies.frames_and_sizes.run import OUT as SIZES
from .studies.frames_and_sizes.run import table as sizes_table
from .studies.quality.report import is_world, values
from .studies.quality.report import table as study_table
from .studies.quality.variants import CEILING
from .studies.small_cards.run import OUT as SMALL_CARDS
from .studies.small_cards.run import table as small_cards_table
from .studies.video_transformers.run import OUT as VIDEO
from .studies.video_transformers.run import table as video_table
from .studies.video_transformers.trained import OUT as TRAINED
from .studies.video_transformers.trained_table import table as trained_table
from .suite.targets import COMPARED, EM, PROFILED, Rows

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
KERNELS = ROOT / "docs/kernels.md"
STUDY = ROOT / "docs/study.md"
ANALYSIS = ROOT / "docs/analysis.md"
EDITS = ROOT / "docs/editing.md"
CARDS = ROOT / "docs/small-cards.md"
CONTROL = ROOT / "docs/control.md"
TRANSFORMERS = ROOT / "docs/video-transformers.md"
RESULTS = Path("benchmarks/results/cpu-2-cores.json")
PROFILES = tuple(RESULTS.with_stem(f"cpu-2-cores-{name}") for name in ("profile", "avx2"))
QUALITY = Path("benchmarks/results/quality.json")
EDITING = Path("benchmarks/results/editing.json")
CONTROLLED = Path("benchmarks/results/editing-control.json")
FEATURES = Path("benchmarks/results/features.json")
EDITED = {
    "the exact answer, through the VAE": EXACT,
    "the source, through the VAE": UNEDITED,
    "`pnp`": BASELINE,
    "`tokenflow`": "tokenflow",
    "`sdedit`": "sdedit",
    "`fatezero`": "fatezero",
    "`fusion`": OURS,
}
EM_CONTENDERS = {
    "eager, divided before the product": EAGER,
    "eager, divided after the product": LEAN_EAGER,
    "`soft_em`, torch backend": "torch",
}
EDITING_RIVALS = {
    **{f"blended attention d={width}": TWO_SDPA for width in (40, 80, 160)},
    **{f"nearest token n={tokens}": PRODUCTS for tokens in (4096, 8192)},
}
BEGIN = "<!-- {}: written by python -m benchmarks.readme -->\n"
END = "<!-- end of {} -->\n"


def table(results: dict[str, Any]) -> str:
    """The Markdown of the measurements, naming machine, versions and commit."""
    rows = _rows(results)
    lines = [
        f"{_source(results)} Medians.",
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
        "| C++ extension against the torch backend, float32 | torch, ms | C++, ms | ratio "
        "| C++ over its floor |",
        "|---|---|---|---|---|",
    ]
    for case in COMPARED:
        torch, cuda = (rows.seconds(case, name) for name in ("torch", "cuda"))
        lines.append(
            f"| {case}: {rows[case, 'cuda'].shape} | {1000 * torch:.1f} | {1000 * cuda:.1f} "
            f"| {torch / cuda:.1f} | {rows.over_floor(case, 'cuda'):.2f} |"
        )
    lines += [
        "",
        "| Operators of editing, float32 | torch, ms | C++, ms | by torch's own operators, ms |",
        "|---|---|---|---|",
    ]
    for case, rival in EDITING_RIVALS.items():
        medians = [1000 * rows.seconds(case, name) for name in ("torch", "cuda", rival)]
        times = " | ".join(f"{median:.1f}" for median in medians)
        lines.append(f"| {case}: {rows[case, 'cuda'].shape} | {times} ({rival}) |")
    return "\n".join([*lines, "", *_layers(rows, LAYER_KINDS)]) + "\n"


def profile_table(path: Path, results: dict[str, Any]) -> str:
    """The Markdown of how many times faster than the torch backend the extension is, by dtype."""
    rows = _rows(results)
    halves = [dtype_name(dtype) for dtype in HALVES]
    suffixes = {"float32": "", **{name: f" {name}" for name in halves}}
    used = results["instructions"]
    lines = [
        f"Torch with {used['torch']}, C++ with {used['C++']}: milliseconds of both, and their "
        f"ratio. {_source(results, path)}",
        "",
        f"| | {' | '.join(suffixes)} |",
        "|---" * (len(suffixes) + 1) + "|",
    ]
    for case in PROFILED:
        cells = []
        for suffix in suffixes.values():
            torch, cuda = (rows.seconds(case + suffix, name) for name in ("torch", "cuda"))
            cells.append(f"{1000 * torch:.1f} / {1000 * cuda:.1f} = {torch / cuda:.1f}")
        lines.append(f"| {case}: {rows[case, 'cuda'].shape} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _layers(rows: Rows, kinds: Sequence[str]) -> list[str]:
    lines = [
        "| One self-attention layer with its projections, milliseconds | 16x16 | 32x32 | 64x64 |",
        "|---|---|---|---|",
    ]
    for kind in kinds:
        medians = [rows.seconds(f"layer {side}x{side} N=4", kind) for side in (16, 32, 64)]
        lines.append(f"| {kind} | {' | '.join(f'{1000 * each:.0f}' for each in medians)} |")
    lines += [
        "",
        'N=4 frames, C=320, h=8, K=256, float32, backend "auto". On a GPU: not measured yet.',
    ]
    return lines


def _rows(results: dict[str, Any]) -> Rows:
    return Rows([Row(**row) for row in results["rows"]])


def _source(results: dict[str, Any], path: Path = RESULTS) -> str:
    where = results["provenance"]
    return (
        f"Source: [{path}]({path}) ({where['cpu']}, {where['threads']} cores, "
        f"torch {where['versions']['torch']}, commit `{where['commit']}`)."
    )


def quality_table(results: dict[str, Any]) -> str:
    """The Markdown of the methods' reconstructions in the quality study."""
    provenance = results["provenance"]
    measured = [row["commit"] for row in results["measured"].values()]
    commits = ", ".join(f"`{commit}`" for commit in dict.fromkeys(measured))
    lines = [
        f"Source: [{QUALITY}]({QUALITY}) ({provenance['cpu']}, "
        f"torch {provenance['versions']['torch']}, commit {commits}): {results['videos']}; "
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


def fidelity_table(results: dict[str, Any]) -> str:
    """The Markdown of the inversions' reconstructions, for the front page."""
    where, worlds = results["provenance"], sum(map(is_world, results["order"]))
    lines = [
        "| Inverted and reconstructed | PSNR dB | PSNR dB, natural | off all-frame attention "
        "| seconds a video |",
        "|---|---|---|---|---|",
    ]
    for method in METHODS:
        world = partial(values, results, method, world=True)
        cells = [
            f"{mean_interval(world('psnr')):.2f}",
            f"{statistics.fmean(values(results, method, 'psnr', world=False)):.2f}",
            f"{100 * statistics.fmean(world('attention_error')):.1f} %",
            f"{statistics.median(world('seconds')):.1f}",
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Source: [{QUALITY}]({QUALITY}) ({where['cpu']}, torch {where['versions']['torch']}): "
        f"means of {worlds} world videos, with a 95 % interval, and of "
        f"{len(results['order']) - worlds} natural clips.",
    ]
    return "\n".join(lines) + "\n"


def flow_table(results: dict[str, Any]) -> str:
    """The Markdown of the features along the flow, with their pictures."""
    where = results["provenance"]
    commits = ", ".join(f"`{commit}`" for commit in dict.fromkeys(results["commits"].values()))
    flows = ", ".join(dict.fromkeys(results["flows"].values()))
    plot, picture = FEATURES.with_suffix(".png"), FEATURES.with_name("features-pca.png")
    lines = [
        f"![Similarity over the timesteps]({plot})",
        "",
        "Means over all timesteps:",
        "",
        features_table(results),
        f"Source: [{FEATURES}]({FEATURES}) ({where['cpu']}, torch {where['versions']['torch']}, "
        f"commit {commits}): the embedded model, {results['steps']} steps, {results['frames']} "
        f"frames of {results['pixels']}x{results['pixels']} pixels; {len(SEEDS)} world videos that "
        f"no training saw, and {CLIP}. Flows: {flows}. "
        "The paper's are read off its plot: another model, other videos, another flow.",
        "",
        f"![Frames, features, the former frame's warped, their similarity]({picture})",
        "",
        f"{results['pictured']}.",
    ]
    return "\n".join(lines) + "\n"


def editing_table(results: dict[str, Any]) -> str:
    """The Markdown of the editing study's means, for the page on editing."""
    heads = [f"{kind}: dB | Warp-Err" for kind in EDIT_KINDS]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (2 * len(EDIT_KINDS) + 1) + "|"]
    for label, name in EDITED.items():
        cells = []
        for kind in EDIT_KINDS:
            series = series_of(results["frames"], kind, name)
            psnr, warp = (editing_values(results, series, each) for each in ("all", "warp"))
            cells += [
                f"{mean_interval(list(psnr.values())):.2f}",
                f"{mean_interval(list(warp.values())):.2f}",
            ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    where = results["provenance"]
    scenes = len(results["rows"][series_of(results["frames"], EDIT_KINDS[0], BASELINE).name])
    lines += [
        "",
        f"Source: [{EDITING}]({EDITING}) ({where['cpu']}, torch {where['versions']['torch']}; "
        f"commits in it). {scenes} world videos of {results['frames']} frames a kind of edit, "
        "95 % intervals; dB: PSNR to the exact answer, of all pixels; Warp-Err x 1000 under the "
        "exact flow of the edited scene.",
    ]
    return "\n".join(lines) + "\n"


def control_table(results: dict[str, Any]) -> str:
    """The Markdown of edits without and with the embedded ControlNet."""
    where = results["provenance"]
    lines = [
        controlled_edits(results),
        f"Source: [{CONTROLLED}]({CONTROLLED}) ({where['cpu']}, torch "
        f"{where['versions']['torch']}; commits in it). World videos of {results['frames']} "
        f"frames, {results['steps']} steps; first without control, then with it at scale 1; dB: "
        "PSNR to the exact answer, of all pixels; Warp-Err x 1000 under the exact flow of the "
        "edited scene; colour and shape as the judge sees them; 95 % intervals, of the "
        "differences scene by scene.",
    ]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Table:
    """One place in a page that is written from measurements.

    Args:
        page: Path of the page.
        results: Path of the results, from the repository's root.
        write: Function that makes Markdown of them, its links from the repository's root.
    """

    page: Path
    results: Path
    write: Callable[[dict[str, Any]], str]


TABLES = {
    "frames and sizes": Table(README, SIZES, sizes_table),
    "fidelity": Table(README, QUALITY, fidelity_table),
    "measured": Table(KERNELS, RESULTS, table),
    "profile": Table(KERNELS, PROFILES[0], partial(profile_table, PROFILES[0])),
    "profile with AVX2": Table(KERNELS, PROFILES[1], partial(profile_table, PROFILES[1])),
    "drop-in": Table(KERNELS, DROP_IN, drop_in_table),
    "quality": Table(STUDY, QUALITY, quality_table),
    "features": Table(ANALYSIS, FEATURES, flow_table),
    "editing": Table(EDITS, EDITING, editing_table),
    "small cards": Table(CARDS, SMALL_CARDS, small_cards_table),
    "control": Table(CONTROL, CONTROLLED, control_table),
    "video transformers": Table(TRANSFORMERS, VIDEO, video_table),
    "video kernels": Table(TRANSFORMERS, VIDEO_COUNTED, video_counted_table),
    "trained video transformer": Table(TRANSFORMERS, TRAINED, trained_table),
}
"""By the name of their place in the page."""
PAGES = tuple(dict.fromkeys(table.page for table in TABLES.values()))


def updated(page: Path) -> str:
    """The text of a page with the tables of the committed results."""
    text = page.read_text()
    up = "../" * (len(page.relative_to(ROOT).parts) - 1)
    for name, place in TABLES.items():
        if place.page == page:
            head, rest = text.split(BEGIN.format(name))
            _, tail = rest.split(END.format(name))
            written = "Not measured yet.\n"
            if (ROOT / place.results).is_file():
                written = place.write(records.read(ROOT / place.results))
            written = written.replace("](", f"]({up}")
            text = f"{head}{BEGIN.format(name)}\n{written}\n{END.format(name)}{tail}"
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(updated(page))

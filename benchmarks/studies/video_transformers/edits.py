"""`python -m benchmarks.studies.video_transformers.edits`: FlowEdit against exact answers.

Edits of one object's colour or shape in unseen videos of the world, by the embedded video
transformer, with exact attention and with STEM's. A stopped run goes on. Writes
`results/video-edits.json` and .md.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from stem import Video
from stem.editing import flow_edit
from stem.flow import EmbeddedVideoModel
from stem.flow.loading import EMBEDDED_VIDEO_FOLDER
from stem.inversion import keep_source
from stem.metrics import mean_interval
from stem.world import world_edit
from stem_kernels.info import provenance

from ... import records
from ..editing.measure import FIRST_SEED, FPS, Edited, Row, figures

OUT = records.RESULTS / "video-edits.json"
FRAMES, STEPS = 8, 24
KINDS = ("colour", "shape")
EXACT = "exact attention"
FORMS: dict[str, dict[str, Any]] = {EXACT: {"dense_below": 10**6}, "defaults": {}}
"""Fields of `VideoConfig` by what the table calls them."""
SETTINGS: dict[str, dict[str, Any]] = {
    "the authors'": {"guidance": 13.5, "options": {"n_max": 16, "source_guidance": 3.5}},
    "weaker": {"guidance": 4.0, "options": {"n_max": 20, "source_guidance": 1.5}},
}
"""Arguments of `flow_edit`; the second was the nearest of six on four other scenes' colours."""
FIGURES = ("all", "inside", "outside", "warp", "colour", "shape")


def edited(model: EmbeddedVideoModel, seed: int, kind: str, form: str, setting: str) -> Row:
    """The figures of one edit."""
    edit = world_edit(seed, kind, FRAMES)
    with tempfile.TemporaryDirectory() as folder:
        source = keep_source(
            model,
            Video(edit.source.frames, FPS),
            edit.source.caption,
            Path(folder),
            options=FORMS[form],
            num_steps=STEPS,
            source="embedded-video",
        )
        frames = flow_edit(model, source, edit.exact.caption, progress=False, **SETTINGS[setting])
    return figures(edit, Edited(frames))


def table(results: Mapping[str, Any]) -> str:
    """The results in Markdown."""
    where = results["provenance"]
    rows = results["rows"]
    scenes = min(len(row) for row in rows.values())
    lines = [
        f"FlowEdit of {scenes} world videos that no training saw, {FRAMES} frames of 64x64 pixels, "
        f"{STEPS} steps, the embedded video transformer; {where['cpu']}, torch "
        f"{where['versions']['torch']}, one thread, commit `{where['commit']}`. PSNR in dB to the "
        "exact answer, of all pixels, of those that it changes, and of the others; Warp-Err (x "
        "1000); share of the frames in which the judge sees the prompt's colour and shape. ±: 95 % "
        "interval of the mean; +: of the differences from exact attention, scene by scene.",
        "",
        "| edit | settings | attention | dB | inside | outside | Warp-Err | colour % | shape % |",
        "|---" * 9 + "|",
    ]
    for kind in KINDS:
        for setting in SETTINGS:
            for form in FORMS:
                own, exact = (rows[_name(kind, setting, one)] for one in (form, EXACT))
                cells = []
                for figure in FIGURES:
                    factor = 100 if figure in ("colour", "shape") else 1
                    found = [factor * row[figure] for row in own.values()]
                    apart = [factor * (own[seed][figure] - exact[seed][figure]) for seed in own]
                    digits = ".0f" if factor == 100 else ".2f"
                    cells.append(
                        f"{mean_interval(found):{digits}}"
                        if form == EXACT
                        else f"{mean_interval(apart):+{digits}}"
                    )
                lines.append(f"| {kind} | {setting} | {form} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _name(kind: str, setting: str, form: str) -> str:
    return f"{kind}, {setting}, {form}"


def main(
    out: Annotated[Path, typer.Option(help="A JSON file; .md goes beside it.")] = OUT,
    scenes: Annotated[int, typer.Option(help="Number of scenes.")] = 10,
) -> None:
    """Edit by FlowEdit, with the embedded video transformer."""
    torch.set_num_threads(1)
    model = EmbeddedVideoModel(EMBEDDED_VIDEO_FOLDER)
    names = [(kind, setting, form) for kind in KINDS for setting in SETTINGS for form in FORMS]
    fresh: dict[str, Any] = {
        "frames": FRAMES,
        "steps": STEPS,
        "settings": SETTINGS,
        "provenance": provenance("diffusers"),
        "rows": {_name(*name): {} for name in names},
    }
    results = records.taken_up(out, fresh, ["rows"])
    for seed in range(FIRST_SEED, FIRST_SEED + scenes):
        for kind, setting, form in names:
            rows = results["rows"][_name(kind, setting, form)]
            if str(seed) not in rows:
                rows[str(seed)] = edited(model, seed, kind, form, setting)
        records.write(results, out)
        print(seed, flush=True)
    out.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    typer.run(main)

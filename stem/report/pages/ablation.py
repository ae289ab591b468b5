"""What a report shows of an ablation."""

from __future__ import annotations

from ..ablation_files import ablation_files
from ..cells import ABLATION_HEADINGS, ablation_cells
from ..documents import Document
from ..rows import read_ablation
from .details import provenance_of, settings_of
from .page import Picture, Report, Section, Table


def ablation_report(document: Document) -> Report:
    """The report of an ablation, from ablation.json."""
    video = document["video"]
    frames, height, width, _ = video["frames"]
    facts = [
        f"{frames} frames, {width}×{height}",
        f"{document['num_steps']} steps",
        f"model {document['model'] or 'not named'}",
        document["device"],
    ]
    title = video["name"] or "a video"
    return Report("Ablation", title, facts, document["note"], [_options(document)])


def _options(document: Document) -> Section:
    plot = ablation_files(document.path.parent)[1]
    rows = [
        (f"{row.option} = {row.value}{' *' if row.is_base else ''}", *ablation_cells(row))
        for row in read_ablation(document.path).values()
    ]
    note = (
        f"*: what the others are changes of. PSNR and SSIM ({document['ssim_variant']}) are means "
        "over the frames; latents: their error |x − x0| / |x0|; seconds: there and "
        f"back, measured once; MiB: the peak above the start ({document['peak_memory']})."
    )
    names = ("prompt", "num_steps", "chunk", "device", "dtype")
    run = settings_of({name: document[name] for name in names})
    return Section(
        "Options, one changed at a time",
        [("prompt", document["prompt"])] if document["prompt"] else [],
        pictures=[Picture("By option; orange: what the others are changes of", plot.read_bytes())],
        tables=[
            Table(
                "Reconstructions against the source", ["option", *ABLATION_HEADINGS], rows, [note]
            )
        ],
        details={
            "Settings": {
                "Run": run,
                "What the options are changes of": settings_of(document["base"]),
            },
            "Provenance": {"": provenance_of(document["provenance"], None)},
        },
    )

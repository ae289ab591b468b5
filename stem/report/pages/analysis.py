"""What a report shows of an analysis of features."""

from __future__ import annotations

from ..analysis_files import analysis_files
from ..cells import SIMILARITY_HEADINGS, similarity_cells
from ..documents import Document
from .details import provenance_of, settings_of
from .page import Picture, Report, Section, Table


def analysis_report(document: Document) -> Report:
    """The report of an analysis, from analysis.json."""
    video = document["video"]
    facts = [
        f"{video['frames']} frames, {video['width']}×{video['height']}",
        f"{document['num_steps']} steps",
        f"model {document['model'] or 'not named'}",
        f"flow: {document['flow']}",
    ]
    sections = [_curves(document), _features(document)]
    title = video["name"] or "a video"
    return Report("Analysis", title, facts, document["note"], sections)


def _curves(document: Document) -> Section:
    plot = analysis_files(document.path.parent)[2]
    rows = [
        (method, *similarity_cells({int(t): value for t, value in curve.items()}))
        for method, curve in document["similarity"].items()
    ]
    note = (
        "Cosine similarity of each frame's features with the former frame's, warped onto it by "
        "the flow: the mean over the cells seen in both."
    )
    return Section(
        "Similarity along the flow",
        [("prompt", document["prompt"])] if document["prompt"] else [],
        pictures=[Picture("Similarity over the timesteps", plot.read_bytes())],
        tables=[Table("Over all timesteps", ["method", *SIMILARITY_HEADINGS], rows, [note])],
    )


def _features(document: Document) -> Section:
    sheet = analysis_files(document.path.parent)[1]
    names = ("prompt", "num_steps", "flow", "timestep_shown", "layer", "features")
    run = settings_of({name: document[name] for name in names})
    run += [("reading", note) for note in document["video"]["notes"]]
    options = {name: settings_of(own) for name, own in document["options"].items() if own}
    caption = "Frames; by method features, the former frame's warped, their similarity"
    return Section(
        f"Features at t = {document['timestep_shown']}",
        pictures=[Picture(caption, sheet.read_bytes(), f"Colours: {document['pca']}.")],
        details={
            "Settings": {"Run": run, **options},
            "Provenance": {"": provenance_of(document["provenance"], None)},
        },
    )

"""`stem report`: what its page shows of results, and what it says where it cannot."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run

from stem.report.curves import Curve
from stem.report.documents import ReportError
from stem.report.edit_files import EditFiles, EditsFiles
from stem.report.files import write_comparison, write_json
from stem.report.pages import panes
from stem.report.pages.contents import read_report
from stem.report.pages.page import page
from stem.report.rows import Measured, Row
from stem.storage import replacing
from stem.video import Video

FRAMES, WIDTH, HEIGHT = 6, 24, 16
PROMPT = "</script><img src='http://example.com/a.png'> & \"a duck\""
VIDEO = {
    "fps": "6",
    "num_frames": FRAMES,
    "width": WIDTH,
    "height": HEIGHT,
    "frames_sha256": "f" * 64,
}
INVERSION = {
    "attention": {"num_bases": 8, "seed": 0},
    "backend": "torch",
    "device": "cpu",
    "dtype": "float32",
    "keep_bases": False,
    "method": "stem",
    "model": {"name": "embedded", "weights_sha256": "a" * 64, "config_sha256": "b" * 64},
    "num_steps": 2,
    "prompt": PROMPT,
    "video": VIDEO,
}


def grays(offset: int = 0) -> torch.Tensor:
    """A video whose frames are of one gray each, 30 more in each: uint8 [N, H, W, 3]."""
    levels = torch.arange(FRAMES, dtype=torch.uint8) * 30 + 40 + offset
    return levels[:, None, None, None].expand(-1, HEIGHT, WIDTH, 3).contiguous()


def write_compared(folder: Path, note: str = "") -> Path:
    rows = [
        Row("vae", math.inf, 1.0, 0.0),
        Row("stem", 30.0, 0.9, 0.1, 1.5, None, 2**20, "x/stem-0"),
    ]
    measured = Measured(rows, {"vae": grays(), "stem": grays(10)}, "cpu", "resident set", True)
    settings = {
        "note": note,
        "model": "embedded",
        "prompt": PROMPT,
        "num_steps": 2,
        "options": {},
        "inversions": {"stem": INVERSION},
    }
    notes = ("16x16 was centre-cropped",)
    write_comparison(folder, measured, Video(grays(), Fraction(6), notes, "ducks"), settings)
    return folder


def write_edit(
    folder: Path,
    prompt: str,
    *,
    exact: bool = True,
    masked: bool = True,
    inversion: dict[str, Any] = INVERSION,
) -> Path:
    masks = {"mask": torch.zeros(FRAMES, HEIGHT, WIDTH, 3, dtype=torch.uint8)} if masked else {}
    second = "exact answer" if exact else "reconstruction"
    videos = {"source": grays(), second: grays(20), "fusion": grays(10), **masks}
    figures = {"psnr_to_exact": 28.0, "psnr_to_exact_by_frame": [28.0] * FRAMES} if exact else {}
    document = {
        "note": "",
        "method": "fusion",
        "prompt": prompt,
        "inversion": "x/stem-0",
        "source_prompt": inversion["prompt"],
        "inversion_settings": inversion,
        "settings": {"seed": 3, "options": {"preset": "colour", "mask_levels": [0.4, 1.0]}},
        "share_that_may_change": 0.25,
        "share_by_frame": [0.25] * FRAMES,
        "durations": {"edit_seconds": 4.0, "steps_done_in_them": 2},
        "provenance": {"cpu": "a CPU", "threads": 1, "gpu": None, "python": "3", "versions": {}},
        **figures,
    }
    EditFiles(folder).write("fusion", videos, Fraction(6), {"source": grays()[:1]}, [0], document)
    return folder


def test_a_comparison_shows_figures_settings_and_where_it_comes_from(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_compared(tmp_path / "ducks-0")
    assert run("report", str(folder)) == 0
    html = (folder / "report.html").read_text()
    assert capfd.readouterr().out.startswith(f"{folder / 'report.html'}, 0.")
    (player,) = [section.player for section in read_report(folder).sections]
    assert player is not None
    assert [pane.label for pane in player.panes] == ["source", "vae alone", "stem"]
    assert [len(pane.frames) for pane in player.panes] == [FRAMES] * 3
    assert (player.fps, player.every, player.width, player.height) == (6.0, 1, WIDTH, HEIGHT)
    for text in (
        "30.00",
        "0.900",
        "reused",
        "1.5",
        "a" * 64,
        "b" * 64,
        "num bases",
        "centre-cropped",
    ):
        assert text in html
    # what a prompt says is text, and no part of the page
    assert "&lt;/script&gt;&lt;img src=" in html
    assert html.count("</script>") == 2
    assert html.count("<img") == 0
    assert html.replace("http://example.com", "").count("http:") == 0


def test_a_note_of_random_weights_is_shown(tmp_path: Path) -> None:
    html = page(read_report(write_compared(tmp_path / "a", note="random <b>numbers</b>")))
    assert "random &lt;b&gt;numbers&lt;/b&gt;" in html


@pytest.mark.parametrize("exact", [True, False])
def test_an_edit_shows_its_mask_and_how_far_it_is_off_where_that_is_known(
    tmp_path: Path, exact: bool
) -> None:
    folder = write_edit(tmp_path / "fusion-0", "a goose", exact=exact)
    report = read_report(folder / "edit.json")
    (section,) = report.sections
    player = section.player
    assert player is not None
    assert (report.kind, report.title) == ("Edit", "a goose")
    second = "exact answer" if exact else "reconstruction"
    labels = [pane.label for pane in player.panes]
    assert labels == ["source", second, "fusion", "may change"]
    assert (player.panes[3].figures, player.panes[3].compared) == ([25.0] * FRAMES, False)
    assert player.reference == int(exact)
    assert (player.curve is not None) == exact
    ((name, psnr, share, *_),) = section.tables[0].rows
    assert (name, psnr, share) == ("fusion", "28.00" if exact else "–", "25.0%")
    assert ("options: mask levels", "0.4, 1.0") in section.details["Settings"]["fusion"]


def test_an_evaluation_beside_an_edit_is_shown_with_what_it_lacks(tmp_path: Path) -> None:
    folder = write_edit(tmp_path / "fusion-0", "a goose")
    figure = {"metric": "LPIPS", "value": None, "measured_by": "", "higher_is_better": False}
    figures = [
        {**figure, "missing": "its weights are not here", "remedy": "get them"},
        {**figure, "metric": "SSIM", "value": 0.98765, "measured_by": "SSIM: 11x11"},
    ]
    evaluation = {"prompt": "a goose", "figures": figures}
    write_json(folder / "evaluation.json", evaluation)
    table = read_report(folder).sections[0].tables[1]
    assert table.rows == [("LPIPS ↓", "missing", ""), ("SSIM ↓", "0.9877", "SSIM: 11x11")]
    assert table.notes[1] == "Missing: LPIPS: its weights are not here; get them"
    write_json(folder / "evaluation.json", {**evaluation, "prompt": "a swan"})
    with pytest.raises(ReportError, match="judges an edit to 'a swan', and the one beside it"):
        read_report(folder)
    (folder / "evaluation.json").write_text("{")
    with pytest.raises(ReportError, match=r"evaluation\.json is damaged; run stem evaluate"):
        read_report(folder)


def test_several_edits_play_together_wherever_their_folders_have_gone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    names = [write_edit(out / f"fusion-{index}", f"goose {index}") for index in range(2)]
    document = {"note": "", "edits": [str(name / "edit.json") for name in names]}
    EditsFiles(out / "edits-0").write({"source": grays()[:1]}, [0], document)
    moved = tmp_path / "moved"
    out.rename(moved)
    (section,) = read_report(moved / "edits-0").sections
    assert section.player is not None
    mask = "may change, fusion"
    expected = ["source", "exact answer", "fusion 1", f"{mask} 1", "fusion 2", f"{mask} 2"]
    assert [pane.label for pane in section.player.panes] == expected
    assert section.lines[1:] == [("fusion 1", "goose 0"), ("fusion 2", "goose 1")]
    shutil.rmtree(moved / "fusion-1")
    with pytest.raises(ReportError, match=r"fusion-1/edit.json is missing; run the command again"):
        read_report(moved / "edits-0")


@pytest.mark.parametrize(("within", "named"), [("", "."), ("", "edits.json"), ("inner", "..")])
def test_a_folder_may_be_named_from_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, within: str, named: str
) -> None:
    name = write_edit(tmp_path / "fusion-0", "a goose")
    document = {"note": "", "edits": [f"out/{name.name}/edit.json"]}  # as of a relative --out
    folder = tmp_path / "edits-0"
    EditsFiles(folder).write({"source": grays()[:1]}, [0], document)
    (folder / within).mkdir(exist_ok=True)
    monkeypatch.chdir(folder / within)
    (section,) = read_report(Path(named)).sections
    assert section.lines[1:] == [("edit", "a goose")]


def test_edits_of_several_folders_share_a_page_if_they_are_of_one_video(tmp_path: Path) -> None:
    one, two = (write_edit(tmp_path / f"edit-{name}", name, exact=False) for name in ("a", "b"))
    (section,) = read_report(one, two).sections
    assert section.player is not None
    labels = [pane.label for pane in section.player.panes]
    assert labels[0] == "source"
    assert labels[2:] == [
        *("fusion 1", "may change, fusion 1", "fusion 2", "may change, fusion 2"),
    ]
    assert [pane.mask for pane in section.player.panes] == [None, None, 3, None, 5, None]
    other = write_edit(tmp_path / "edit-c", "c", exact=False)
    document = json.loads((other / "edit.json").read_text())
    document["inversion_settings"]["video"]["num_frames"] += 1
    (other / "edit.json").write_text(json.dumps(document))
    with pytest.raises(ReportError, match="is an edit of another video than"):
        read_report(one, other)
    with pytest.raises(ReportError, match="only edits are shown side by side"):
        read_report(one, write_compared(tmp_path / "compared"))


def test_of_a_long_video_some_frames_are_shown_and_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_compared(tmp_path / "a")
    monkeypatch.setattr(panes, "MOST_PIXELS", 3 * FRAMES * WIDTH * HEIGHT // 2)
    report = read_report(folder)
    player = report.sections[0].player
    assert player is not None
    assert (player.every, player.count, player.fps, player.num_frames) == (2, 3, 3.0, FRAMES)
    assert player.panes[2].figures is not None
    assert len(player.panes[2].figures) == 3
    assert "Every 2nd frame is shown" in page(report)


@pytest.mark.parametrize("masked", [(True, False), (False, True)])
def test_edits_with_and_without_masks_keep_in_step(
    masked: tuple[bool, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = [write_edit(tmp_path / f"edit-{each}", "a", masked=each) for each in masked]
    for parts, every in ((6, 1), (4, 2)):  # five panes: a source, an answer, two edits, a mask
        monkeypatch.setattr(panes, "MOST_PIXELS", parts * FRAMES * WIDTH * HEIGHT)
        (section,) = read_report(*edits).sections
        player = section.player
        assert player is not None
        assert len(player.panes) == 5
        assert player.every == every
        assert {len(pane.frames) for pane in player.panes} == {FRAMES // every}


def test_edits_of_several_inversions_say_whose_is_whose(tmp_path: Path) -> None:
    other = {
        **INVERSION,
        "method": "ddim",
        "num_steps": 3,
        "prompt": "a swan",
        "model": {**INVERSION["model"], "name": "another"},
    }
    edits = [
        write_edit(tmp_path / f"edit-{n}", "a", exact=False, inversion=each)
        for n, each in enumerate((INVERSION, other, INVERSION))
    ]
    report = read_report(*edits)
    assert report.facts[-1] == "model embedded, another"
    (section,) = report.sections
    assert section.player is not None
    assert section.lines[:2] == [
        ("source of fusion 1, fusion 3", PROMPT), ("source of fusion 2", "a swan")
    ]  # fmt: skip
    labels = [pane.label for pane in section.player.panes]
    assert [label for label in labels if label.startswith("recon")] == [
        "reconstruction, fusion 1", "reconstruction, fusion 2"
    ]  # fmt: skip
    settings = section.details["Settings"]
    assert ("method", "stem") in settings["Inversion of fusion 1, fusion 3"]
    assert ("method", "ddim") in settings["Inversion of fusion 2"]
    assert ("steps", "3") in settings["Inversion of fusion 2"]


def test_a_curve_has_round_ticks_and_gaps_where_there_is_no_figure() -> None:
    curve = Curve("PSNR", {"a": [31.2, math.inf, 33.9], "b": [30.1] * 3}, {"a": 1, "b": 2})
    assert curve.tick_texts == ["30", "31", "32", "33", "34"]
    assert (curve.y(34.0), curve.y(30.0), curve.x(2)) == (0.0, 1000.0, 1000.0)
    ((colour, broken), (_, line)) = curve.paths()
    assert (colour, broken) == (1, "M0.0 700.0h0M1000.0 25.0h0")
    assert line == "M0.0 975.0h0L500.0 975.0L1000.0 975.0"
    assert curve.spoken == "PSNR: a 31.20 to 33.90; b 30.10 to 30.10"
    flat = Curve("PSNR", {"a": [34.0]}, {"a": 0})
    assert flat.tick_texts == sorted(set(flat.tick_texts))
    assert Curve("PSNR", {"a": [math.inf]}, {"a": 0}).paths() == [(0, "")]


def spoil(folder: Path, what: str) -> None:
    document = folder / "compare.json"
    if what == "file":
        (folder / "compare.mp4").unlink()
    elif what == "hash":
        (folder / "compare.png").write_bytes(b"")
    elif what == "json":
        document.write_text("{")
    else:
        content: dict[str, Any] = json.loads(document.read_text())
        del content["psnr_by_frame"]
        write_json(document, content)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("file", "holds compare.json, but not compare.mp4; run the command again"),
        ("hash", "are not those that it was written with; run the command again"),
        ("json", "compare.json is damaged; run the command again"),
        ("version", "has no 'psnr_by_frame': another version wrote it; remove its folder"),
    ],
)
def test_what_is_missing_or_damaged_is_named(tmp_path: Path, what: str, message: str) -> None:
    folder = write_compared(tmp_path / "a")
    spoil(folder, what)
    with pytest.raises(ReportError, match=message):
        read_report(folder)


def test_a_folder_of_something_else_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: object) -> str:
        assert run("report", *map(str, arguments)) == 2
        return " ".join(capfd.readouterr().err.split())

    kinds = "compare.json, edit.json, edits.json, demo-*.json, analysis.json or ablation.json"
    assert f"{tmp_path / 'a'} is no folder; name one that stem compare" in said(tmp_path / "a")
    assert f"holds no {kinds}; name a folder that stem compare, edit, demo" in said(tmp_path)
    folder = write_compared(tmp_path / "a")
    (tmp_path / "b").mkdir()
    assert f"name one of the folders in it, {folder}" in said(tmp_path)
    for name in ("demo-0.json", "demo-1.json"):
        (tmp_path / name).write_text("{}")
    assert "holds several runs; name one of" in said(tmp_path)
    assert "is none of compare.json" in said(folder / "compare.mp4")
    assert "is a folder; name a file in it" in said(folder, "--out", tmp_path)
    assert "is a file, not a folder" in said(folder, "--out", folder / "compare.json" / "a.html")


def test_an_error_names_the_one_file_that_was_not_written(tmp_path: Path) -> None:
    """beside.mp4 is written while edit.mp4 is; where it fails, it alone is said to."""
    folder = tmp_path / "edit"
    files = EditFiles(folder)

    def full() -> Iterator[torch.Tensor]:
        with replacing(files.beside):
            raise OSError(errno.ENOSPC, "No space left on device")
        yield grays()[0]

    with pytest.raises(OSError, match=r"beside\.mp4 cannot be written") as error:
        files.write("fusion", {"fusion": full()}, Fraction(6), {}, [], {})
    assert "edit.mp4" not in str(error.value)
    assert str(error.value).count("free some space") == 1
    assert list(folder.iterdir()) == []

"""Edits of world videos, and the study of editing on them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.functional import max_pool2d

from benchmarks import records
from benchmarks.studies.editing import measure as editing_measure
from benchmarks.studies.editing import memory as editing_memory
from benchmarks.studies.editing import run as editing
from benchmarks.studies.editing.measure import Edited, Job, measure, overlap
from benchmarks.studies.editing.report import differences, gains, report, values
from benchmarks.studies.editing.variants import VARIANTS, Series, series_of, wanted
from stem import InversionFolder
from stem.metrics import mean_interval, pooled_psnr, warp_error
from stem.world import EDIT_KINDS, WorldEdit, judge, sample_scene, world_edit

SEEDS = range(42_000_000, 42_000_012)


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_an_edit_changes_its_object_and_its_word_alone(kind: str) -> None:
    for seed in SEEDS:
        edit = world_edit(seed, kind, 3)
        source, exact = edit.source.frames, edit.exact.frames
        assert torch.equal(source[~edit.region], exact[~edit.region])
        assert not torch.equal(source, exact)
        # No farther from the objects than their rims, and the tips that no centre lies in.
        near = max_pool2d(edit.objects.float()[:, None], 5, 1, 2)[:, 0] > 0
        assert bool((edit.objects <= edit.region).all())
        assert bool((edit.region <= near).all())
        if kind != "shape":
            assert torch.equal(edit.source.masks, edit.exact.masks)
        before, after = edit.source.caption.split(), edit.exact.caption.split()
        old, new = edit.words
        assert len(after) - len(before) == len(new) - len(old)
        # One word taken away or put in, at the same place: the rest is the same.
        place = next(
            (at for at, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1])
        )
        assert tuple(before[place : place + len(old)]) == old
        assert tuple(after[place : place + len(new)]) == new
        assert before[place + len(old) :] == after[place + len(new) :]
        (thing,) = sample_scene(seed, num_things=1).things
        kept = {"colour": thing.colour, "shape": thing.shape}
        now = {"colour": edit.colour, "shape": edit.shape}
        assert {name for name in kept if kept[name] != now[name]} == {kind} - {"texture"}


def test_an_edit_is_of_its_seed() -> None:
    one, same = (world_edit(SEEDS[0], "shape", 2) for _ in range(2))
    assert torch.equal(one.exact.frames, same.exact.frames)
    assert one.words == same.words
    assert len({world_edit(seed, "colour", 1).words for seed in SEEDS}) > 6
    with pytest.raises(ValueError, match="kind is 'size'; it must be one of colour, texture"):
        world_edit(SEEDS[0], "size", 2)


def test_the_exact_answer_is_right() -> None:
    for seed in SEEDS[:4]:
        edit = world_edit(seed, "colour", 8)
        exact = edit.exact
        verdicts = [judge(frame) for frame in exact.frames]
        assert all(verdict and verdict.colour == edit.colour for verdict in verdicts)
        # Along its own flow the exact answer is steady but for aliasing; without it, it moves.
        steady = warp_error(exact.frames, exact.flow, exact.occlusion)
        still = warp_error(exact.frames, torch.zeros_like(exact.flow), exact.occlusion)
        assert 2 * steady < still
        assert pooled_psnr(exact.frames, edit.source.frames, edit.region) < 20


FRAMES = 2


class StandIn:
    """Gives the exact answer with noise that grows from method to method, and counts its calls."""

    def __init__(self) -> None:
        self.calls: list[Series] = []

    def __call__(
        self, series: Series, edit: WorldEdit, inversion: Callable[[str], InversionFolder]
    ) -> Edited:
        self.calls.append(series)
        amount = {"pnp": 24, "fusion": 6}.get(series.variant, 12)
        generator = torch.Generator().manual_seed(len(series.name))
        noise = torch.randint(-amount, amount + 1, edit.exact.frames.shape, generator=generator)
        frames = (edit.exact.frames + noise).clamp(0, 255).to(torch.uint8)
        if series.variant != "fusion":
            return Edited(frames, seconds=2.0)
        cores = max_pool2d(edit.objects.float()[:, None], 4)[:, 0] > 0
        return Edited(frames, cores, cores, seconds=4.0, extra_bytes=3 * 2**20)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.long
@pytest.mark.usefixtures("one_thread")
def test_an_interrupted_study_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, standin = tmp_path / "editing.json", StandIn()
    editing.study(out, FRAMES, editing.plan(1, FRAMES, 0, 0, ["pnp"]), 1, standin)
    first = records.read(out)["rows"]
    assert {len(row) for row in first.values()} == {1}
    assert not out.with_name("editing-best.png").exists()  # nothing to compare pnp with
    standin.calls.clear()

    jobs = editing.plan(2, FRAMES, 1, 0, ["pnp", "fusion"])
    editing.study(out, FRAMES, jobs, 1, standin)
    results = records.read(out)
    # pnp of the first scene on its own inversion is there; crossed, it is not.
    drawn = 4  # pnp and fusion, of the best and of the worst case
    assert len(standin.calls) == 3 * (3 + 4 + 1 + 4) + drawn
    for name, row in first.items():
        assert results["rows"][name]["42000000"] == row["42000000"]
    pnp, fusion = (series_of(FRAMES, "shape", name) for name in ("pnp", "fusion"))
    found = results["rows"][fusion.name]["42000001"]
    assert found["overlap"] == 1
    assert found["mebibytes"] == 3
    assert found["colour"] == 1
    # Uniform noise of up to 6 levels has the variance 6 * 7 / 3.
    assert found["all"] == pytest.approx(36.67, abs=0.2)
    assert results["rows"][pnp.name]["42000001"]["overlap"] is None

    above = differences(results, fusion, pnp, "all")
    both = [values(results, each, "all") for each in (fusion, pnp)]
    gained = [both[0][seed] - both[1][seed] for seed in both[0]]
    assert above == mean_interval(gained)
    assert gains(results)["shape", 42000001] == pytest.approx(gained[1])
    text = out.with_suffix(".md").read_text()
    shapes = text[text.index("| shape, 2 frames |") :]
    assert re.search(
        rf"\| fusion \| 2 \| [\d.]+ ± [\d.]+ \| {re.escape(f'{above:+.2f}')} \|", shapes
    )
    assert re.search(r"\| shape, fusion \| 2 \|", text)
    assert re.search(r"\| shape, pnp \| 1 \|", text)
    assert Image.open(out.with_suffix(".png")).size[0] > 1000
    for which in ("best", "worst"):
        assert Image.open(out.with_name(f"editing-{which}.png")).size == (2 * 128, 5 * 152)

    monkeypatch.setitem(VARIANTS, "pnp", VARIANTS["sdedit"])
    capsys.readouterr()
    kept = editing.run(out, FRAMES, [], 1, standin)
    assert {series.split(" on ")[0] for series in kept["rows"] if " on " in series} == {"fusion"}
    assert "pnp has changed: Variant(method='pnp'" in capsys.readouterr().out
    assert "| fusion | 2 |" in report(kept)
    with pytest.raises(SystemExit, match="is of another frames: 2, now 3; move it away"):
        editing.run(out, 3, [], 1, standin)


@pytest.mark.usefixtures("one_thread")
def test_the_study_edits_with_this_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editing_measure, "STEPS", 2)
    job = Job(
        SEEDS[8], (series_of(FRAMES, "colour", "pnp"), series_of(FRAMES, "colour", "ceiling"))
    )
    edited, ceiling = measure(job, tmp_path).values()
    (inversion,) = tmp_path.glob("*/ddim-*")
    assert InversionFolder.open(inversion).complete
    assert edited["seconds"] is not None
    assert edited["overlap"] is None
    assert ceiling["all"] is not None
    assert edited["all"] is not None
    assert 10 < edited["all"] < ceiling["all"] < 50


def test_every_method_is_wanted_once() -> None:
    series = wanted("colour", 8, crossed=True)
    assert len(set(series)) == len(series)
    names = {(each.variant, each.inversion) for each in series}
    assert {("pnp", "stem"), ("fatezero", "st-ddim"), ("fatezero", "stem")} < names
    assert "guidance 3" not in {each.variant for each in wanted("shape", 8, crossed=True)}
    long = editing.plan(3, 8, 0, 2, [])
    assert [job.seed - SEEDS[0] for job in long] == [0] * 6 + [1] * 6 + [2] * 3


def test_options_follow_the_words() -> None:
    added = next(edit for seed in SEEDS if not (edit := world_edit(seed, "texture", 1)).words[0])
    assert VARIANTS["fatezero"].options_for(added)["mapping"] == "refine"
    shape = world_edit(SEEDS[0], "shape", 1)
    options = VARIANTS["fatezero"].options_for(shape)
    assert options["mapping"] == "replace"
    assert options["blend_words"] == shape.words
    assert VARIANTS["fusion"].options_for(shape)["preset"] == "shape"


def test_masks_are_compared_cell_by_cell() -> None:
    objects = torch.zeros(1, 8, 8, dtype=torch.bool)
    objects[0, 1, 1] = True  # one pixel of the first of 2x2 cells
    cores = torch.tensor([[[True, True], [False, False]]])
    assert overlap(cores, objects) == 0.5


def test_memory_is_measured_once_a_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def point(module: str, way: str, frames: str) -> dict[str, Any]:
        asked.append((way, int(frames)))
        mebibytes = 100 + (10 if way == "one batch" else 2) * int(frames)
        return {"bytes": mebibytes * 2**20, "backend": "torch"}

    monkeypatch.setattr(editing_memory, "measured_apart", point)
    out = tmp_path / "memory.json"
    editing_memory.run(out, [4, 8])
    files = "chunks of 4 that wait in files"
    assert asked == [("one batch", 4), ("one batch", 8), ("chunks of 4", 8), (files, 8)]
    results = editing_memory.run(out, [4, 8, 16])
    assert asked[4:] == [("one batch", 16), ("chunks of 4", 16), (files, 16)]
    text = editing_memory.table(results)
    assert "| one batch | 140 | 180 | 260 | 10.0 |" in text
    assert "| chunks of 4 |  | 116 | 132 | 2.0 |" in text
    editing_memory.draw(results, tmp_path / "memory.png")
    assert Image.open(tmp_path / "memory.png").size[0] > 500

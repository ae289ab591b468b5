"""What the page does when it is used: what it refuses, and what it shows unasked."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clips import encode, smooth
from commands import run

from stem.app import state as state_of_page
from stem.app.commands import AskedError, Edits, Inversion
from stem.app.jobs import DONE, Jobs
from stem.app.state import State
from stem.app.uploads import Videos

pytest.importorskip("gradio", reason="the extra `app` is not installed")

from stem.app.actions import Actions

RESULTS = 4  # among what a tick gives


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    jobs = Jobs(tmp_path / "app" / "jobs")
    yield State(tmp_path, jobs, Videos(tmp_path / "app" / "videos"), ["embedded"])
    jobs.close()


@pytest.fixture
def inversion(tmp_path: Path) -> Inversion:
    rest = {"chunk": "auto", "first": 0, "stop": 8, "size": "64", "out": str(tmp_path)}
    return Inversion("a.mp4", "embedded", "ddim", "", 4, **rest)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("first", "last", "said"),
    [
        (None, 2, "the first frame is empty; the video has 6 frames, from 0 to 5"),
        (0, None, "the last frame is empty; the video has 6 frames, from 0 to 5"),
        (0, 6, "the last frame is 6; the video has 6 frames, from 0 to 5"),
        (-1, 2, "the first frame is -1; the video has 6 frames, from 0 to 5"),
        (3, 2, "the last frame is 2, before the first, which is 3"),
    ],
)
def test_frames_that_are_not_there(
    state: State, tmp_path: Path, first: int | None, last: int | None, said: str
) -> None:
    clip = encode(tmp_path / "a.mp4", smooth(6), "libx264", "yuv420p")
    state.videos.add("a", clip, "a.mp4", "")
    notice, *_ = Actions(state).inverted("a", first, last, "", "embedded", "stem", "", 2, "auto")
    assert said in notice
    assert state.jobs.all() == []


def edits(source: Inversion | str, **fields: Any) -> Edits:
    asked = {"prompts": ["a"], "methods": ["fusion"], "preset": "", "guidance": None}
    rest = {"negative_prompt": "", "seed": 0, "options": [], "out": "out"}
    return Edits(source, **{**asked, **rest, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"methods": ["fusion", "fatezero"], "preset": "colour"},
        {"methods": ["pnp"], "preset": "shape"},
        {"options": ["pnp.x=1"]},
        {"options": ["stem.num_bases=4"]},
        {"options": ["fusion.preset"]},
    ],
)
def test_edits_that_the_command_refuses_are_refused_in_its_words(
    fields: dict[str, Any],
    inversion: Inversion,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(AskedError) as refused:
        edits(inversion, **fields)
    asked = edits(inversion)
    given = {"methods": asked.methods, "preset": "", "options": [], **fields}
    for name, value in given.items():
        object.__setattr__(asked, name, value)  # as a page that looks at nothing
    assert run(*asked.arguments()) == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert str(refused.value).partition(". For one")[0] in said


def test_edits_that_the_command_takes_are_taken(inversion: Inversion) -> None:
    edits(inversion, methods=["fusion", "fatezero"], preset="shape")
    edits(inversion, methods=["fusion", "pnp"], preset="colour")
    edits(dataclasses.replace(inversion, method="stem"), options=["stem.num_bases=4"])
    with pytest.raises(AskedError, match=r"with a method of fusion$"):
        edits("out/inversions/stem-0", options=["stem.num_bases=4"])  # it is made already


def write_result(state: State, name: str) -> str:
    """The name of a result, once the job that made it is done."""
    file = state.out / name / "edit.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"method": "fusion", "prompt": name}))
    job = state.jobs.add(name, [], {"kind": "edit", "prompts": [name], "methods": ["fusion"]})
    job.log.write_text(f"{file}\n")
    state.jobs.change(job.number, state=DONE, ended=1.0)
    return name


def test_what_is_made_is_shown_but_not_in_the_place_of_what_was_chosen(state: State) -> None:
    actions = Actions(state)
    first = write_result(state, "fusion-a")
    seen, *_ = actions.loaded()
    second = write_result(state, "fusion-b")
    seen, *rest = actions.tick(seen, None, [first])  # as `loaded` set it
    assert rest[RESULTS - 1]["value"] == [second]
    third = write_result(state, "fusion-c")
    seen, *rest = actions.tick(seen, None, [first, second])
    assert "value" not in rest[RESULTS - 1]
    assert [name for _, name in rest[RESULTS - 1]["choices"]] == [third, second, first]
    fourth = write_result(state, "fusion-d")
    _, *rest = actions.tick(seen, None, [])
    assert rest[RESULTS - 1]["value"] == [fourth]


def test_a_report_is_made_anew_where_what_it_shows_has_changed(
    state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write_result(state, "fusion-a")
    monkeypatch.setattr(state_of_page, "run_now", lambda arguments: "")
    pages = [state.page_of([name])[0]]
    assert state.page_of([name])[0] == pages[0]
    evaluation = state.out / name / "evaluation.json"
    evaluation.write_text("{}")
    pages.append(state.page_of([name])[0])
    os.utime(evaluation, ns=(1, 1))
    pages.append(state.page_of([name])[0])
    monkeypatch.setattr(state_of_page, "__version__", "another")
    pages.append(state.page_of([name])[0])
    assert len(set(pages)) == len(pages)

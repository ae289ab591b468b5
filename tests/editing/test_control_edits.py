"""Edits under ControlNets: the source is shown its own pictures, the edit these or others."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from controls import make_adapter_pipeline, make_control_pipeline, pictures
from interruptions import stop_after
from inversions import inverted

from stem import Control
from stem.editing import METHODS, run_edit
from stem.inversion import InversionFolder

FRAMES = 3
STEPS = 4


def of_level(first: int) -> torch.Tensor:
    """Pictures of one grey level each, `first` and the next: they tell their frames."""
    levels = torch.arange(first, first + FRAMES, dtype=torch.uint8)
    return levels[:, None, None, None].expand(FRAMES, 16, 24, 3).contiguous()


SOURCE, EDITED = of_level(0), of_level(100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> InversionFolder:
    return inverted(
        tmp_path_factory.mktemp("controlled"),
        pipeline=make_control_pipeline(),
        control=Control(SOURCE),
        num_steps=STEPS,
        chunk=2,
    )


def edited(folder: InversionFolder, method: str, **settings: Any) -> torch.Tensor:
    settings = {"resume": False, "progress": False, **settings}
    found = run_edit(make_control_pipeline(), folder, "a swan", method=method, **settings)
    return found.latents


@pytest.fixture
def calls() -> Iterator[list[list[int]]]:
    """The grey levels of what the ControlNet is shown, a list for each call."""
    seen: list[list[int]] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        levels = kwargs["controlnet_cond"][:, 0, 0, 0] * 255
        seen.append(levels.round().int().tolist())

    hook = make_control_pipeline().controlnet.register_forward_pre_hook(look, with_kwargs=True)
    yield seen
    hook.remove()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_edits_under_control(
    folder: InversionFolder, method: str, calls: list[list[int]]
) -> None:
    own = edited(folder, method)
    assert {level for call in calls for level in call} == {0, 1, 2}
    calls.clear()
    other = edited(folder, method, control=Control(EDITED))
    assert own.isfinite().all()
    assert not torch.equal(own, other)
    # A call is of the source's branch, or of all others; rows are [branch, frame].
    for call in calls:
        assert max(call) < 100 or min(call) >= 100
        assert call == call[: len(set(call))] * (len(call) // len(set(call)))
    # SDEdit's source rows are only looked at; they see the source's control, too.
    assert {level for call in calls for level in call} == {0, 1, 2, 100, 101, 102}
    weak = edited(folder, method, control=Control(EDITED, scale=1e-3))
    assert not torch.equal(weak, other)


def test_pivots_are_shown_their_own_pictures(
    folder: InversionFolder, calls: list[list[int]]
) -> None:
    options = {"chunk": 2, "pivots": [[1, 2]] * STEPS}
    edited(folder, "tokenflow", options=options, control=Control(EDITED))
    of_a_step = calls[: len(calls) // STEPS]
    # The pivots in one chunk, then all frames in two; the source's rows, then the others'.
    assert of_a_step == [[1, 2], [101, 102] * 2, [0, 1], [100, 101] * 2, [2], [102] * 2]


@pytest.mark.parametrize("method", METHODS)
def test_a_stopped_edit_goes_on_bit_for_bit(folder: InversionFolder, method: str) -> None:
    settings: dict[str, Any] = {"control": Control(pictures(seed=5), scale=0.7)}
    expected = edited(folder, method, **settings)
    with pytest.raises(KeyboardInterrupt):
        edited(folder, method, resume=True, on_step=stop_after(2), **settings)
    again: list[int] = []
    found = edited(folder, method, resume=True, on_step=lambda: again.append(1), **settings)
    assert torch.equal(found, expected)
    assert 0 < len(again) < STEPS
    assert "forward" not in vars(make_control_pipeline().unet)
    # Another control is another edit.
    other = dataclasses.replace(settings["control"], scale=0.6)
    assert not torch.equal(edited(folder, method, resume=True, control=other), expected)


def test_the_same_control_given_again_is_the_inversion_s(folder: InversionFolder) -> None:
    own = edited(folder, "fusion")
    again = edited(folder, "fusion", control=Control(SOURCE))
    assert (again - own).norm() / own.norm() < 1e-5


@pytest.mark.parametrize("method", ["tokenflow", "fusion"])
def test_edits_under_an_adapter(tmp_path: Path, method: str) -> None:
    pipeline = make_adapter_pipeline()
    folder = inverted(
        tmp_path, pipeline=pipeline, control=Control(SOURCE), num_steps=STEPS, chunk=2
    )
    settings: dict[str, Any] = {"method": method, "resume": False, "progress": False}
    own = run_edit(pipeline, folder, "a swan", **settings).latents
    other = run_edit(pipeline, folder, "a swan", control=Control(EDITED), **settings).latents
    assert own.isfinite().all()
    assert not torch.equal(own, other)


def test_controls_that_do_not_fit_the_inversion(folder: InversionFolder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 2 pictures, and the video 3 frames"):
        edited(folder, "pnp", control=Control(EDITED[:2]))
    with pytest.raises(ValueError, match="has a ControlNet, and control has 2"):
        edited(folder, "pnp", control=[Control(EDITED)] * 2)

"""Restarts of `fusion`: what they make of latents, and in which order steps are done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from inversions import inverted
from pipelines import make_pipeline

from stem.editing import FusionOptions, edit_options, run, run_edit
from stem.editing.methods.fusion import Fusion
from stem.editing.regions.consensus import Motion, carried
from stem.editing.run import Preview
from stem.inversion import InversionFolder

MASKED = {"mask_threshold": 0.95, "dilation": 0}  # of tokens of random weights, some cells
SETTINGS: dict[str, Any] = {"resume": False, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> InversionFolder:
    return inverted(tmp_path_factory.mktemp("restarts"))  # five steps


class Seen(Fusion):
    """Keeps what `fusion` goes on with after each step, and where."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def after_step(self, place: int, latents: torch.Tensor) -> torch.Tensor | None:
        found = super().after_step(place, latents)
        assert found is not None
        self.seen.append((self.visits[place], latents.clone(), found.clone()))
        return found


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Seen]:
    """The edits by `fusion` that a test makes."""
    made: list[Seen] = []

    def make(*given: Any) -> Seen:
        made.append(Seen(*given))
        return made[-1]

    monkeypatch.setitem(run._METHODS, "fusion", make)
    return made


def edited(folder: InversionFolder, seed: int = 0, **options: Any) -> torch.Tensor:
    chosen = {"preset": "shape", **MASKED, **options}
    pipeline = make_pipeline()
    return run_edit(pipeline, folder, "a goose", seed=seed, options=chosen, **SETTINGS).latents


@pytest.mark.parametrize("consensus", [True, False])
def test_a_restart_noises_what_is_inside_the_mask(
    folder: InversionFolder, watched: list[Seen], consensus: bool
) -> None:
    edited(folder, consensus=consensus)
    (work,) = watched
    assert [step for step, _, _ in work.seen] == [0, 1, 2, 1, 2, 1, 2, 3, 4]
    alphas = work.scheduler.alphas_cumprod[work.scheduler.timesteps].double()
    kept = float(alphas[1] / alphas[3])
    noises = []
    for place in (2, 4):
        _, before, after = work.seen[place]
        # Masks narrow at a later step: these are those that the restart had.
        source = work.job.level(4)
        inside = (after != source).any(1)
        assert inside.any()
        assert not inside.all()
        noise = (after - kept**0.5 * before) / (1 - kept) ** 0.5
        assert 0.5 < float(noise.permute(1, 0, 2, 3)[:, inside].std()) < 1.5
        if not consensus:  # one draw for all frames, where they are
            for frame in range(1, len(noise)):
                both = inside[0] & inside[frame]
                torch.testing.assert_close(
                    noise[frame][:, both], noise[0][:, both], rtol=0, atol=1e-4
                )
        noises.append(noise)
    same = (noises[0] - noises[1]).abs().amax(1)[inside] < 1e-3
    assert not same.any()


def test_noise_is_carried_with_the_object_cell_by_cell() -> None:
    noise = torch.randn(1, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    centres = torch.tensor([[-2 / 12, 4 / 8], [0.0, 0.0], [4 / 12, -2 / 8]])
    found = carried(noise, Motion(centres, torch.ones(3)))
    assert torch.equal(found[1], noise[0])
    # Two cells of width 2 / 12 to the right, one of height 2 / 8 up; one to the left, two down.
    assert torch.equal(found[2, :, :-1, 2:], noise[0, :, 1:, :-2])
    assert torch.equal(found[0, :, 2:, :-1], noise[0, :, :-2, 1:])
    grown = carried(noise, Motion(centres + 0.03, torch.tensor([0.8, 1.0, 1.3])))
    for channel in range(3):
        assert set(grown[:, channel].flatten().tolist()) <= set(
            noise[0, channel].flatten().tolist()
        )


def test_a_still_object_has_one_noise_in_all_frames() -> None:
    noise = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    still = Motion(torch.full((4, 2), 0.3), torch.full((4,), 0.5))
    assert torch.equal(carried(noise, still), noise.expand(4, -1, -1, -1))


def test_the_seed_draws_the_noise_of_restarts_alone(folder: InversionFolder) -> None:
    with_restarts = [edited(folder, seed) for seed in (0, 0, 1)]
    assert torch.equal(with_restarts[0], with_restarts[1])
    assert not torch.equal(with_restarts[0], with_restarts[2])
    without = [edited(folder, seed, restarts=0) for seed in (0, 1)]
    assert torch.equal(*without)
    assert not torch.equal(without[0], with_restarts[0])


@pytest.mark.parametrize(
    ("steps", "visits"),
    [
        (1, [0]),
        (2, [0, 1]),
        (4, [0, 1, 1, 1, 2, 3]),
        (10, [0, 1, 2, 3, 4, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_the_steps_that_come_again(
    tmp_path: Path, watched: list[Seen], steps: int, visits: list[int]
) -> None:
    edited(inverted(tmp_path, num_steps=steps))
    (work,) = watched
    assert [step for step, _, _ in work.seen] == visits


def test_previews_count_every_step(folder: InversionFolder) -> None:
    shown: list[tuple[int, int]] = []
    preview = Preview([0], lambda done, total, clean: shown.append((done, total)))
    options = {"preset": "shape", **MASKED}
    run_edit(make_pipeline(), folder, "a goose", options=options, preview=preview, **SETTINGS)
    assert shown == [(2, 9), (4, 9), (6, 9)]


def test_only_the_preset_shape_restarts() -> None:
    counts = {}
    for preset in FusionOptions.presets:
        options = edit_options("fusion", {"preset": preset})
        assert isinstance(options, FusionOptions)
        counts[preset] = options.restarts
    assert counts == {"colour": 0, "texture": 0, "shape": 2, "style": 0}

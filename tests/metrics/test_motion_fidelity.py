"""Motion fidelity on tracks with known answers, masks, and CoTracker in torch.hub's folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from clips import noise, smooth

from stem.metrics import (
    CoTracker,
    UnmeasuredError,
    bounding_box,
    inside,
    matched_motion_fidelity,
    motion_fidelity,
    mse,
    outside,
    pooled_psnr,
    psnr,
)


def straight(*directions: tuple[float, float], frames: int = 6) -> torch.Tensor:
    """Tracks of even motion, [n, frames, 2]."""
    steps = torch.tensor(directions)[:, None] * torch.arange(float(frames))[None, :, None]
    return steps + torch.arange(10.0, 10 * len(directions) + 1, 10)[:, None, None]


RIGHT, DOWN, LEFT, STILL = (2.0, 0.0), (0.0, 5.0), (-1.0, 0.0), (0.0, 0.0)


def test_directions_are_matched_with_the_best_of_the_others() -> None:
    source = straight(RIGHT, RIGHT, DOWN)
    # Of three tracks the third has no other like it: 1, 1 and the better of 1 - 1 and 0.
    assert motion_fidelity(source, source) == pytest.approx(2 / 3)
    faster = straight((7.0, 0.0), (7.0, 0.0), (0.0, 1.0))
    assert motion_fidelity(faster, source) == pytest.approx(2 / 3)
    # The first two are at right angles to the third, which is itself at none but to its own.
    assert motion_fidelity(straight(LEFT, LEFT, LEFT), source) == pytest.approx(-1 / 3)
    assert motion_fidelity(straight(LEFT, LEFT), straight(RIGHT, RIGHT)) == pytest.approx(-1)
    slanted = straight((1.0, 1.0), (1.0, 1.0), (1.0, 1.0))
    assert motion_fidelity(slanted, source) == pytest.approx(0.5**0.5)
    assert motion_fidelity(straight(STILL, STILL), straight(RIGHT, RIGHT)) == 0
    turned = torch.cat([straight(RIGHT, RIGHT), straight(DOWN, DOWN) + 100], dim=1)
    halves = torch.cat([straight(RIGHT, RIGHT), straight(LEFT, LEFT) + 100], dim=1)
    same = turned[:, 6] - turned[:, 5]
    jump = torch.nn.functional.cosine_similarity(same, halves[:, 6] - halves[:, 5])
    assert motion_fidelity(turned, halves) == pytest.approx((5 + float(jump[0])) / 11, abs=1e-5)


def test_directions_need_tracks() -> None:
    one = straight(RIGHT, frames=1)
    with pytest.raises(UnmeasuredError, match=r"1 frames are too few for it; give .* at least 2"):
        motion_fidelity(one, one)
    with pytest.raises(UnmeasuredError, match="no point is tracked"):
        motion_fidelity(one[:0], one[:0])
    with pytest.raises(ValueError, match=r"are \[1, 1, 2\] and \[0, 1, 2\]"):
        motion_fidelity(one, one[:0])


def test_places_are_matched_one_to_one() -> None:
    source = straight(RIGHT, DOWN, LEFT)
    seen = torch.ones(3, 6, dtype=torch.bool)
    order = [2, 0, 1]
    assert matched_motion_fidelity(source[order], seen, source, seen) == 1
    # One track of extent 10, moved by 5: places are half an extent off, and steps equal.
    one, shown = straight(RIGHT), seen[:1]
    moved = one + torch.tensor([0.0, 5.0])
    assert matched_motion_fidelity(moved, shown, one, shown) == pytest.approx(0.7 / 1.5 + 0.3)
    # Far away, the similarity is that of the steps, and does not exceed the threshold.
    far = straight((0.0, 2.0)) + torch.tensor([1e6, 0.0])
    assert matched_motion_fidelity(far, shown, one, shown) == 0
    # What is seen of an even motion is stretched: the first half of it moves half as fast.
    half = shown.clone()
    half[:, 4:] = False
    stretched = torch.stack([torch.linspace(10, 16, 6), torch.full((6,), 10.0)], dim=1)[None]
    found = matched_motion_fidelity(one, half, stretched, shown)
    assert found == pytest.approx(1)
    with pytest.raises(UnmeasuredError, match="no point is seen in two frames"):
        matched_motion_fidelity(one, torch.zeros_like(shown), one, shown)
    with pytest.raises(UnmeasuredError, match=r"4 frames are too few for it; give .* at least 5"):
        matched_motion_fidelity(one[:, :4], shown[:, :4], one[:, :4], shown[:, :4])


def test_outside_a_mask_its_pixels_count_as_equal() -> None:
    original, video = smooth(2, 16, 20), noise(2, 16, 20)
    masks = torch.zeros(2, 16, 20, dtype=torch.bool)
    masks[:, 2:10, 5:15] = True
    one = torch.where(masks[..., None], video, original)
    assert mse(outside(one, masks), outside(original, masks)) == 0
    pairs = [outside(frames, masks) for frames in (video, original)]
    share = 1 - float(masks.float().mean())
    background = pooled_psnr(video, original, ~masks)
    expected = background - 10 * torch.tensor(share).log10()
    assert pooled_psnr(*pairs) == pytest.approx(float(expected), abs=1e-4)
    assert mse(*pairs) == pytest.approx(10 ** (-float(expected) / 10), rel=1e-4)
    assert psnr(*pairs) == pytest.approx(float(expected), abs=0.2)  # the mean of two frames
    assert torch.equal(outside(video, masks) + inside(video, masks), video)
    box = torch.zeros(16, 20, dtype=torch.bool)
    box[2:9, 5:14] = True
    assert torch.equal(bounding_box(masks), box)
    with pytest.raises(UnmeasuredError, match="the masks have no box"):
        bounding_box(torch.zeros_like(masks))
    with pytest.raises(ValueError, match=r"the masks are torch.bool \[1, 16, 20\]; frames of"):
        outside(video, masks[:1])


HUB = """
dependencies = ["torch"]
import torch
{extra}
torch.manual_seed(0)

class Predictor(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Linear(1, 2)

    def forward(self, video, grid_size, segm_mask):
        assert video.dtype == torch.float32 and video.max() > 1
        kept = grid_size**2 if segm_mask is None else int(segm_mask.sum())
        places = torch.arange(2.0 * video.shape[1] * kept).view(1, video.shape[1], kept, 2)
        return places * self.model.weight[0], torch.ones(1, video.shape[1], kept)

def cotracker3_offline(*, pretrained=True):
    assert not pretrained  # which would download
    return Predictor()
"""


def test_cotracker_is_taken_from_torch_hubs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    command = (
        """python -c 'import torch; torch.hub.load("facebookresearch/co-tracker", """
        """"cotracker3_offline")'"""
    )
    code = tmp_path / "hub" / "facebookresearch_co-tracker_main"
    with pytest.raises(UnmeasuredError, match=r"hubconf.py is not in .*co-tracker_main") as caught:
        CoTracker()
    assert caught.value.remedy == command
    code.mkdir(parents=True)
    (code / "hubconf.py").write_text(HUB.format(extra="import no_such_package"))
    with pytest.raises(UnmeasuredError, match=r"scaled_offline.pth is not in .*checkpoints"):
        CoTracker()
    weights = tmp_path / "hub" / "checkpoints" / "scaled_offline.pth"
    weights.parent.mkdir()
    torch.save({"weight": torch.tensor([[3.0], [3.0]]), "bias": torch.zeros(2)}, weights)
    with pytest.raises(UnmeasuredError, match=r"needs no_such_package.*; pip install no_such_pack"):
        CoTracker()
    (code / "hubconf.py").write_text(HUB.format(extra=""))
    before = torch.random.get_rng_state()
    tracker = CoTracker()
    assert torch.equal(torch.random.get_rng_state(), before)
    tracks = tracker(noise(4, 8, 10), 3)
    assert tracks.places.shape == (9, 4, 2)
    assert tracks.places[1, 0].tolist() == [6, 9]
    assert tracks.seen.dtype == torch.bool
    where = torch.zeros(8, 10, dtype=torch.bool)
    where[2:4, 5] = True
    assert tracker(noise(4, 8, 10), 3, where).places.shape == (2, 4, 2)

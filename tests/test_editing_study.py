"""Edits of world videos, and the study of editing on them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import max_pool2d

from stem.metrics import pooled_psnr, warp_error
from stem.toy import EDIT_KINDS, judge, sample_scene, world_edit

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

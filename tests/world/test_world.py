"""The procedural world: seeds, captions, exact flow, masks, occlusion and edits, and its judge."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import grid_sample, max_pool2d

from stem.world import (
    VOCABULARY,
    Background,
    Scene,
    Thing,
    caption,
    changed,
    judge,
    render,
    sample_scene,
)
from stem.world.grammar import COLOURS, MAX_CAPTION_WORDS, PATTERNS, SHAPES, TEXTURES
from stem.world.motion import PAN, TRAVEL

BLUE = Background("plain", "blue")
STILL = Scene(BLUE, (Thing("ball", "red", "small", "striped"),))
PAIR = Scene(
    Background("cloudy", "gray", seed=3),
    (
        Thing("ball", "red", "small", "striped", "right", position=(0.1, 0.0)),
        Thing("star", "green", "large", "dotted", "spin", position=(-0.1, 0.2)),
    ),
    overlap=True,
    camera="up",
)


def near(mask: torch.Tensor, pixels: int) -> torch.Tensor:
    """bool [..., H, W], grown by so many pixels to each side."""
    flat = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    return (max_pool2d(flat, 2 * pixels + 1, 1, pixels) > 0).view_as(mask)


def warped_back(frames: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """Frame t + 1 seen from frame t, float [N-1, H, W, 3]."""
    size = frames.shape[1]
    axis = torch.arange(size, dtype=torch.float32)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    there = (torch.stack([x, y], dim=-1) + flow + 0.5) * (2 / size) - 1
    pictures = frames[1:].permute(0, 3, 1, 2).float()
    back = grid_sample(pictures, there, padding_mode="border", align_corners=False)
    return back.permute(0, 2, 3, 1)


def silhouette(scene: Scene, index: int, num_frames: int, size: int) -> torch.Tensor:
    """bool [N, H, W]: one object's mask as if nothing were in front of it."""
    alone = replace(scene, things=(scene.things[index],), overlap=False)
    return render(alone, num_frames, size).masks[:, 0]


def inner(clip_masks: torch.Tensor) -> torch.Tensor:
    """bool [N, H, W]: pixels two or more away from every outline."""
    surfaces = torch.cat([clip_masks, ~clip_masks.any(1, keepdim=True)], dim=1)
    return ~(near(surfaces, 2).sum(1) > 1)


def test_equal_seeds_give_equal_bits_and_leave_the_global_generators_alone() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    clips = [render(sample_scene(7, 2), 4, 32) for _ in range(2)]
    judge(clips[0].frames[0])
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    for name in ("frames", "masks", "flow", "occlusion"):
        assert torch.equal(getattr(clips[0], name), getattr(clips[1], name)), name
    assert len({sample_scene(seed) for seed in range(50)}) == 50


@pytest.mark.parametrize(("num_frames", "size", "things"), [(1, 8, 1), (5, 33, 2), (3, 64, 2)])
def test_forms(num_frames: int, size: int, things: int) -> None:
    clip = render(sample_scene(0, things), num_frames, size)
    assert clip.frames.shape == (num_frames, size, size, 3)
    assert clip.masks.shape == (num_frames, things, size, size)
    assert clip.flow.shape == (num_frames - 1, size, size, 2)
    assert clip.occlusion.shape == (num_frames - 1, size, size)
    dtypes = [getattr(clip, name).dtype for name in ("frames", "masks", "flow", "occlusion")]
    assert dtypes == [torch.uint8, torch.bool, torch.float32, torch.bool]
    assert (clip.masks.sum(1) <= 1).all()


def test_every_size_shows_the_same_scene() -> None:
    for seed in range(8):
        small, large = (render(sample_scene(seed), 3, size) for size in (64, 256))
        halved = large.frames.float().unflatten(1, (64, 4)).unflatten(3, (64, 4)).mean((2, 4))
        assert (halved - small.frames).abs().mean() < 1.0
        # Edges take part in neither; elsewhere flow is in pixels of its own size.
        flow = large.flow.unflatten(1, (64, 4)).unflatten(3, (64, 4)).mean((2, 4)) / 4
        assert (flow - small.flow)[inner(small.masks)[:-1]].abs().max() < 1e-3


def test_span_cuts_the_motion() -> None:
    whole = render(PAIR, 5, 32)
    assert torch.equal(render(PAIR, 1, 32, span=(0.5, 0.5)).frames[0], whole.frames[2])
    assert torch.equal(render(PAIR, 3, 32, span=(0.5, 1.0)).frames, whole.frames[2:])


def test_captions() -> None:
    assert caption(replace(STILL, camera="left")) == (
        "a small striped red ball rests on a blue background while the camera pans left"
    )
    orange = replace(PAIR, background=Background("plain", "orange"), camera="still")
    assert caption(orange) == (
        "a small striped red ball moves right in front of a large dotted green star that spins "
        "on an orange background"
    )
    captions = [caption(sample_scene(seed)).split() for seed in range(1500)]
    # Neither a word outside the vocabulary nor a word of it that no caption has.
    assert {word for words in captions for word in words} == set(VOCABULARY)
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    assert all(word.isalpha() and word.islower() for word in VOCABULARY)
    assert max(map(len, captions)) <= MAX_CAPTION_WORDS


def test_flow_of_a_translation_is_the_displacement() -> None:
    thing = Thing("square", "red", "small", motion="right", angle=0.3, pace=0.8)
    clip = render(Scene(BLUE, (thing,), camera="up"), 8, 96)
    pan = torch.tensor([0.0, PAN]) / 7 * 48  # the camera goes up, so the world goes down
    move = torch.tensor([0.8 * TRAVEL, 0.0]) / 7 * 48
    shown = clip.masks[:-1, 0]
    assert (clip.flow[shown] - (pan + move)).abs().max() < 1e-4
    assert (clip.flow[~shown] - pan).abs().max() < 1e-4
    rows, columns = zip(*(mask.nonzero().float().mean(0) for mask in clip.masks[:, 0]), strict=True)
    centre = torch.stack([torch.stack(columns), torch.stack(rows)], dim=-1)
    assert (centre[-1] - centre[0] - 7 * (pan + move)).abs().max() < 0.5


@pytest.mark.parametrize("motion", ["right", "up", "spin", "grow", "shrink"])
def test_flow_carries_each_frame_to_the_next(motion: str) -> None:
    for texture in TEXTURES[1:]:
        things = (
            Thing("cross", "red", "small", texture, motion, position=(0.2, 0.1), angle=0.2),
            Thing("square", "green", "large", texture, motion, position=(-0.2, -0.1)),
        )
        clip = render(Scene(Background("cloudy", "blue", seed=1), things, True, "left"), 6, 192)
        sure = inner(clip.masks)[:-1] & ~clip.occlusion
        # What lands close to an outline is a mixture there.
        sure &= warped_back(inner(clip.masks)[..., None].expand(-1, -1, -1, 3), clip.flow)[
            ..., 0
        ].eq(1)
        assert sure.float().mean() > 0.7
        for region in (sure & clip.masks[:-1].any(1), sure & ~clip.masks[:-1].any(1)):
            now = clip.frames[:-1].float()
            error = (warped_back(clip.frames, clip.flow) - now)[region].abs().mean()
            unmoved = (warped_back(clip.frames, 0 * clip.flow) - now)[region].abs().mean()
            assert error < 2.0
            assert error < 0.3 * unmoved


def test_masks_are_where_the_colour_shows() -> None:
    for seed in range(20):
        scene = sample_scene(seed, 2)
        for index, thing in enumerate(scene.things):
            taken = {scene.background.colour, *(other.colour for other in scene.things)}
            colour = next(word for word in COLOURS if word not in taken)
            things = list(scene.things)
            things[index] = replace(thing, colour=colour)
            one, other = (
                render(which, 4, 64) for which in (scene, replace(scene, things=tuple(things)))
            )
            differs = (one.frames != other.frames).any(-1)
            assert torch.equal(one.masks, other.masks)
            assert differs[one.masks[:, index]].all()
            assert not (differs & ~near(silhouette(scene, index, 4, 64), 2)).any()


def test_occlusion_is_none_where_nothing_moves() -> None:
    clip = render(STILL, 3, 48)
    assert not clip.occlusion.any()
    assert clip.flow.abs().max() < 1e-5


def test_occlusion_is_what_is_covered_or_out_of_the_picture() -> None:
    # A square that goes right covers a strip as wide as its step; the pan loses one at the edge.
    size, frames = 128, 5
    thing = Thing("square", "red", "small", motion="right", angle=0.0)
    clip = render(Scene(BLUE, (thing,)), frames, size)
    step = TRAVEL / (frames - 1) * size / 2
    height = clip.masks[0, 0].any(1).sum()
    assert not (clip.occlusion & clip.masks[:-1, 0]).any()
    assert torch.equal(clip.occlusion, clip.masks[1:, 0] & ~clip.masks[:-1, 0])
    assert (clip.occlusion.sum((1, 2)) / height - step).abs().max() <= 1
    clip = render(Scene(BLUE, (replace(thing, motion="still"),), camera="right"), frames, size)
    lost = clip.occlusion & ~near(clip.masks[:-1, 0], 9)
    step = PAN / (frames - 1) * size / 2
    columns = (torch.arange(size) + 0.5 < step).expand(frames - 1, size, size)
    assert torch.equal(lost, columns & ~near(clip.masks[:-1, 0], 9))


def test_occlusion_agrees_with_masks_of_both_frames() -> None:
    wrong = total = 0
    for seed in range(20):
        clip = render(sample_scene(seed, 2), 6, 96)
        surfaces = torch.cat([clip.masks, ~clip.masks.any(1, keepdim=True)], dim=1)
        found = surfaces.float().argmax(1)
        ahead = torch.stack([warped_back(s[..., None].expand(-1, -1, -1, 3), clip.flow)[..., 0]
                             for s in surfaces.unbind(1)], dim=-1)  # fmt: skip
        sure = ahead.amax(-1) == 1
        y, x = torch.meshgrid(*(torch.arange(96.0),) * 2, indexing="ij")
        landing = torch.stack([x, y], dim=-1) + clip.flow
        outside = ((landing < -0.5) | (landing > 95.5)).any(-1)
        expected = outside | (ahead.argmax(-1) != found[:-1])
        assert sure.float().mean() > 0.9
        wrong += int((clip.occlusion != expected)[sure].sum())
        total += int(expected[sure].sum())
    # A tip between the pixels' centres covers, and no mask shows it.
    assert wrong < 0.002 * total


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("red ball", "blue star", "small striped blue star"),
        ("striped red ball", "red ball", "small red ball"),
        ("green", "large dotted cyan", "large dotted cyan star"),
        ("the large star", "a small triangle", "small dotted green triangle"),
    ],
)
def test_an_edit_changes_its_object_only(old: str, new: str, words: str) -> None:
    after = changed(PAIR, old, new)
    assert words in caption(after)
    one, other = render(PAIR, 5, 64), render(after, 5, 64)
    differs = (one.frames != other.frames).any(-1)
    edited = 0 if "ball" in old else 1
    union = silhouette(PAIR, edited, 5, 64) | silhouette(after, edited, 5, 64)
    assert differs.any()
    assert not (differs & ~near(union, 2)).any()
    assert after.things[1 - edited] == PAIR.things[1 - edited]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("crimson ball", "blue ball", "'crimson'; its words must be among .*red, orange"),
        ("red ball", "blue green ball", "two words for the colour"),
        ("blue ball", "red ball", "names 0 objects; there is a small striped red ball and a large"),
        ("ball", "", "must name a size, a texture, a colour, a shape"),
    ],
)
def test_edits_that_cannot_be(old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(PAIR, old, new)


def test_values_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="'hexagon'; it must be one of ball"):
        Thing("hexagon", "red")
    with pytest.raises(ValueError, match=r"background's; it must be one of red"):
        changed(STILL, "red", "blue")
    with pytest.raises(ValueError, match="names 2 objects"):
        changed(replace(PAIR, things=(PAIR.things[0],) * 2), "red", "blue")
    with pytest.raises(ValueError, match="num_frames is 0"):
        render(STILL, 0, 64)
    with pytest.raises(ValueError, match="size is 7"):
        render(STILL, 1, 7)
    with pytest.raises(ValueError, match="span"):
        render(STILL, 1, 64, span=(0.0, 1.5))
    with pytest.raises(ValueError, match="num_things is 3"):
        sample_scene(0, 3)
    with pytest.raises(ValueError, match="seed is -1"):
        sample_scene(-1)


def test_the_sampler_overlaps_what_it_says() -> None:
    for seed in range(60):
        scene = sample_scene(seed, 2)
        front, back = (silhouette(scene, index, 9, 32) for index in (0, 1))
        if not scene.overlap:
            assert not (front & back).any()
        shown = render(scene, 9, 32).masks
        assert torch.equal(shown[:, 0], front)
        assert torch.equal(shown[:, 1], back & ~front)


def test_the_judge_knows_true_renders() -> None:
    verdicts = []
    for seed in range(5000, 5200):
        scene = sample_scene(seed, 1)
        time = seed % 5 / 4
        verdict = judge(render(scene, 1, 64, span=(time, time)).frames[0])
        assert verdict is not None
        thing = scene.things[0]
        verdicts.append((verdict.colour == thing.colour, verdict.shape == thing.shape))
    right = torch.tensor(verdicts).float().mean(0)
    assert right[0] >= 0.98
    assert right[1] >= 0.98


def test_the_judge_knows_every_shape_on_every_background() -> None:
    for pattern in PATTERNS:
        for index, shape in enumerate(SHAPES):
            thing = Thing(shape, "purple", "small", TEXTURES[index % 3], angle=0.7)
            frame = render(Scene(Background(pattern, "pink", 0.4), (thing,)), 1, 64).frames[0]
            verdict = judge(frame)
            assert verdict is not None
            assert (verdict.colour, verdict.shape) == ("purple", shape), pattern


def test_the_judge_takes_the_largest_and_sees_none_where_there_is_none() -> None:
    ball, star = PAIR.things
    apart = (replace(ball, position=(0.6, -0.6)), replace(star, position=(-0.4, 0.4)))
    verdict = judge(render(replace(PAIR, things=apart, overlap=False), 1, 64).frames[0])
    assert verdict is not None
    assert (verdict.colour, verdict.shape) == ("green", "star")
    clip = render(STILL, 1, 64)
    empty = clip.frames[0].clone()
    empty[:] = empty[0, 0]
    assert judge(empty) is None
    with pytest.raises(ValueError, match="must be uint8"):
        judge(empty.float())

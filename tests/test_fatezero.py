"""FateZero: how two prompts' words map, whose maps are fused, and what an edit then gives."""

from __future__ import annotations

import dataclasses
import logging
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from pipelines import make_pipeline
from test_inversion import clip, inverted

from stem import InversionFolder, Video, invert
from stem.attention.hooks import Operands, Site
from stem.attention.processor import attend_densely
from stem.diffusion.loop import denoise
from stem.diffusion.pipeline import encode_prompt
from stem.diffusion.schedule import sampling_scheduler
from stem.editing import Edit, FateZeroOptions, check_edit, edit_latents, run_edit
from stem.editing.fatezero import FateZero
from stem.editing.job import Job
from stem.editing.map_fusion import MapFusion
from stem.editing.masks import layer_size
from stem.editing.prompts import (
    PromptTokens,
    alignment,
    changed_words,
    places_of,
    prompt_tokens,
    refined_columns,
    replaced_columns,
)
from stem.inversion.methods import attention_on


def tokens_of(text: str, length: int = 12) -> PromptTokens:
    """Tokens as if each letter were one: begin mark 0, end mark 1."""
    tokens, places = [0], []
    for word in text.split():
        places.append(tuple(range(len(tokens), len(tokens) + len(word))))
        tokens += map(ord, word)
    return PromptTokens(text, (*tokens, 1), tuple(places), length)


def test_replaced_words_map_in_order_or_evenly() -> None:
    source, target = tokens_of("a cat ox"), tokens_of("a dog cow")
    columns = replaced_columns(source, target)
    expected = torch.zeros(12, 12)
    expected[range(5), range(5)] = 1.0  # begin, "a", "cat" -> "dog"
    expected[5:7, 5:8] = 1 / 3  # "ox" -> "cow"
    expected[range(7, 11), range(8, 12)] = 1.0  # end mark and filling
    assert torch.equal(columns.matrix, expected)
    assert torch.equal(columns.share, torch.ones(12))

    back = replaced_columns(target, source)
    assert torch.equal(back.matrix[5:8, 5:7], torch.full((3, 2), 0.5))
    assert back.share.tolist() == [1.0] * 11 + [0.0]  # no filling is left for the last column
    maps, own = torch.rand(2, 12), torch.rand(2, 12)
    assert torch.equal(back(maps, own)[:, 11], own[:, 11])
    torch.testing.assert_close(back(maps, own)[:, :11].sum(1), maps.sum(1))
    with pytest.raises(ValueError, match=r"has 2 words and 'a b c' has 3; .*mapping='refine'"):
        replaced_columns(tokens_of("a b"), tokens_of("a b c"))


def test_refined_words_keep_their_own_columns_where_they_are_new() -> None:
    source, target = tokens_of("a ox ran", 13), tokens_of("a big ox ran", 13)
    assert alignment("axy", "abxz") == [0, None, 1, None]
    assert alignment("ab", "ba") == [1, None]  # ties: from the end, the target's item is left
    columns = refined_columns(source, target)
    assert columns.share.tolist() == [1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    placed = columns.matrix.argmax(0)
    assert placed[columns.share > 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert refined_columns(target, source).share.tolist() == [1.0] * 10 + [0.0] * 3
    maps = torch.rand(3, 13)
    torch.testing.assert_close(refined_columns(source, source)(maps, -maps), maps)


def test_words_are_found_whatever_their_case_and_punctuation() -> None:
    prompt = "A duck's pond, a Lake; and a pond."
    assert places_of(["POND", "lake!"], prompt) == [2, 4, 7]
    assert places_of(["duck's pond"], prompt) == [1, 2, 7]
    with pytest.raises(ValueError, match=r"no 'sea', 'cat' among the words .* A, duck's, pond,"):
        places_of(["sea", "cat", "lake"], prompt)
    assert changed_words("a red ball and a red ring", "a blue ball, and a big red ring") == (
        [1],
        [1, 5],
    )


@pytest.mark.parametrize("shape", ["sd1", "sdxl"])
def test_tokens_of_a_prompt_that_is_cut_off(shape: str) -> None:
    pipeline = make_pipeline(shape)
    found = prompt_tokens(pipeline, "A duck's T-shirt, big")
    assert found.first == 1
    assert [position for word in found.of_words for position in word] == list(range(1, found.end))
    assert all(found.of_words)
    long = prompt_tokens(pipeline, "duck " * 60 + "end")
    assert (long.end, len(long.tokens), long.length) == (76, 77, 77)
    kept = [position for word in long.of_words for position in word]
    assert kept == list(range(1, 76))
    with pytest.raises(ValueError, match=r"'end' in 'duck .* cut off, .* 77 tokens"):
        long.positions([60])
    assert refined_columns(found, long).matrix.shape == (77, 77)


def layer(groups: int, tokens: int, keys: int, biased: bool) -> Operands:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(3, groups, *shape, generator=generator)

    bias = drawn(1, keys)[:1].expand(3, -1, -1, -1) if biased else None
    return Operands(drawn(2, tokens, 4), drawn(2, keys, 4), drawn(2, keys, 5), bias)


def weights(operands: Operands, video: int) -> torch.Tensor:
    logits = operands.query[video] @ operands.key[video].mT / 2
    if operands.bias is not None:
        logits = logits + operands.bias[video].unsqueeze(-2)
    return logits.softmax(-1)


def attend(operands: Operands) -> torch.Tensor:
    if operands.bias is None:
        return attend_densely(operands)
    return torch.stack([weights(operands, v) @ operands.value[v] for v in range(len(operands.key))])


@pytest.mark.parametrize(("groups", "biased"), [(2, False), (1, False), (1, True)])
@pytest.mark.parametrize("masked", ["no", "tensor", "function"])
def test_maps_are_fused_for_the_last_video_alone(groups: int, biased: bool, masked: str) -> None:
    frames, columns = [1, 3], refined_columns(tokens_of("a b"), tokens_of("a c"))
    site = Site("layer", Attention(8), frames, None)
    hook = MapFusion(columns, (5, 4))
    operands = layer(groups, 12 // groups, 7, biased)
    share = torch.rand(4, 3, 2, generator=torch.Generator().manual_seed(1))
    if masked == "tensor":
        share = torch.rand(4, 5, 4, generator=torch.Generator().manual_seed(1))
        hook.mask = share
        share = torch.nn.functional.adaptive_avg_pool2d(share, (3, 2))
    elif masked == "function":
        hook.mask = lambda size: share if size == (3, 2) else torch.empty(0)
    assert hook.operands(site, operands) is operands
    assert torch.equal(hook.attend(site, operands, attend), attend(operands))
    hook.self_on = True
    fused = hook.attend(site, hook.operands(site, operands), attend)
    m = torch.zeros(()) if masked == "no" else share[frames].reshape(groups, 1, -1, 1)
    maps = m * weights(operands, 2) + (1 - m) * weights(operands, 0)
    torch.testing.assert_close(fused[2], maps @ operands.value[2])
    torch.testing.assert_close(fused[:2], attend(operands)[:2])
    alone = operands.of(slice(0, 1))
    assert torch.equal(hook.attend(site, hook.operands(site, alone), attend), attend(alone))


def test_text_maps_take_shares_by_word_and_the_equalizer() -> None:
    columns = refined_columns(tokens_of("a b", 4), tokens_of("a c", 4))
    site = SimpleNamespace(frames=range(2))
    factors = torch.tensor([1.0, 1.0, 10.0, 2.0])
    hook = MapFusion(columns, (2, 2), equalizer=factors)
    maps = torch.rand(3, 2, 2, 4, 4)
    assert hook.text_maps(site, maps) is maps
    hook.cross = torch.tensor([1.0, 0.5, 1.0, 0.0])
    source, target = maps[0], maps[2]
    expected = torch.stack(
        [
            source[..., 0],
            0.5 * source[..., 1] + 0.5 * target[..., 1],
            10 * target[..., 2],  # a word of the target alone
            target[..., 3],
        ],
        dim=-1,
    )
    fused = hook.text_maps(site, maps)
    torch.testing.assert_close(fused[2], expected)
    assert torch.equal(fused[:2], maps[:2])


def test_sizes_of_layers_halve_rounding_up() -> None:
    assert [layer_size(tokens, 9, 6) for tokens in (54, 15, 6, 2)] == [
        (9, 6),
        (5, 3),
        (3, 2),
        (2, 1),
    ]
    with pytest.raises(ValueError, match=r"20 tokens a frame.*9x6"):
        layer_size(20, 9, 6)


SOURCE, TARGET = "a duck", "a big swan"
BLEND = FateZeroOptions(
    blend_words=(["duck"], ["Swan"]),
    blend_threshold=0.97,
    blend_latents=True,
    cross_replace={"swan": 0.3, "default_": 0.8},
    equalize={"big": 3},
)


def job_of(inversion: InversionFolder, prompt: str, guidance: float, pipeline: Any = None) -> Job:
    pipeline = make_pipeline() if pipeline is None else pipeline
    texts = (encode_prompt(pipeline, text, 16, 24) for text in (SOURCE, "", prompt))
    return Job(pipeline, inversion, prompt, *texts, guidance, 0, torch.device("cpu"))


def edited(job: Job, options: FateZeroOptions, chunk: int | None) -> tuple[torch.Tensor, FateZero]:
    work = FateZero(job, options)
    work.config = dataclasses.replace(work.config, chunk=chunk)
    with work.running(), torch.no_grad():
        found = denoise(
            work.begin(),
            sampling_scheduler(job.pipeline, job.num_steps),
            work.predict,
            after_step=work.after_step,
            name="edit",
        )
    return found, work


@pytest.fixture(scope="module")
def inversions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, InversionFolder]:
    root = tmp_path_factory.mktemp("inverted")
    return {name: inverted(root, method=name) for name in ("ddim", "st-ddim", "inflated", "stem")}


@pytest.mark.parametrize("method", ["ddim", "st-ddim", "inflated", "stem"])
def test_the_source_prompt_gives_the_source_back(
    inversions: dict[str, InversionFolder], method: str
) -> None:
    job = job_of(inversions[method], SOURCE, 1.0)
    work = FateZero(job, FateZeroOptions(cross_replace=1.0, self_replace=1.0))
    scheduler = sampling_scheduler(job.pipeline, job.num_steps)
    with work.running(), torch.no_grad():
        for step, timestep in enumerate(scheduler.timesteps):
            # The latents that the inversion's step was predicted from, and so its prediction.
            before, after = job.level(job.num_steps - step - 1), job.level(job.num_steps - step)
            noise = work.predict(step, timestep, before)
            back = scheduler.step(noise, timestep, after).prev_sample
            torch.testing.assert_close(back, before, atol=2e-5, rtol=0)
        start, first = job.level(job.num_steps), job.timestep(job.num_steps)
        fused = work.predict(0, first, start)
    work = FateZero(job, FateZeroOptions(cross_replace=0.0, self_replace=0.0))
    with work.running(), torch.no_grad():
        assert (work.predict(0, first, start) - fused).norm() > 1e-3 * fused.norm()


@pytest.mark.parametrize("method", ["st-ddim", "stem"])
def test_nothing_depends_on_the_chunk(inversions: dict[str, InversionFolder], method: str) -> None:
    job = job_of(inversions[method], TARGET, 7.5)
    whole, work = edited(job, BLEND, None)
    assert 0.02 < work.kept["cores"].float().mean() < 0.98
    assert bool((work.kept["cores"] <= work.kept["masks"]).all())
    in_chunks, other = edited(job, BLEND, 2)
    assert (in_chunks - whole).norm() < 1e-5 * whole.norm()
    assert torch.equal(other.kept["masks"], work.kept["masks"])


def test_a_killed_edit_goes_on_bit_for_bit(inversions: dict[str, InversionFolder]) -> None:
    inversion, steps = inversions["stem"], 0

    def run(resume: bool, **more: Any) -> Edit:
        arguments: dict[str, Any] = {"method": "fatezero", "options": BLEND, "progress": False}
        return run_edit(make_pipeline(), inversion, TARGET, resume=resume, **arguments, **more)

    def kill() -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(True, on_step=kill)
    done: list[int] = []
    resumed = run(True, on_step=lambda: done.append(1))
    whole = run(False)
    assert len(done) == 2
    assert torch.equal(resumed.latents, whole.latents)
    assert resumed.masks is not None
    assert whole.masks is not None
    assert torch.equal(resumed.masks, whole.masks)
    assert resumed.masks.dtype == torch.bool
    assert resumed.masks.shape == (3, 8, 12)


@pytest.mark.parametrize(
    ("method", "options", "store"),
    [
        ("ddim", FateZeroOptions(self_replace=(0.2, 0.6)), "memory"),
        ("st-ddim", BLEND, "disk"),
        ("inflated", BLEND, "disk"),
    ],
)
def test_stored_maps_are_those_that_are_computed_again(
    inversions: dict[str, InversionFolder], method: str, options: FateZeroOptions, store: str
) -> None:
    job = job_of(inversions[method], TARGET, 7.5)
    expected, _ = edited(job, options, 2)
    found, _ = edited(job, dataclasses.replace(options, store=store), 2)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert not [*job.inversion.path.glob(".*")]


@pytest.mark.parametrize(
    ("shape", "kind", "space"),
    [("sd2", "v_prediction", "feature"), ("sdxl", "epsilon", "key")],
)
def test_every_shape_of_pipeline_is_edited(
    tmp_path: Path, shape: str, kind: str, space: str
) -> None:
    pipeline = make_pipeline(shape, kind)
    options = {"num_bases": 8, "space": space}
    common: dict[str, Any] = {"num_steps": 2, "progress": False}
    inversion = invert(pipeline, clip(2), SOURCE, tmp_path, options=options, **common)
    found = edit_latents(
        pipeline, inversion, TARGET, method="fatezero", options=BLEND, progress=False
    )
    assert found.shape == inversion.x0().shape
    assert bool(found.isfinite().all())
    job = job_of(inversion, SOURCE, 1.0, pipeline)
    work = FateZero(job, FateZeroOptions(cross_replace=1.0, self_replace=1.0))
    with work.running(), torch.no_grad():
        source = job.level(1)
        given = work.predict(0, job.timestep(2), source)
    with attention_on(pipeline, job.attention), torch.no_grad():
        (own,) = job.predict([source], job.timestep(2), job.source)
    torch.testing.assert_close(given, own, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["st-ddim", "stem"])
def test_identical_frames_stay_identical(tmp_path: Path, method: str) -> None:
    frames = clip(1).frames.expand(3, -1, -1, -1).contiguous()
    common: dict[str, Any] = {"method": method, "num_steps": 2, "progress": False}
    common["options"] = {"num_bases": 8} if method == "stem" else None
    inversion = invert(make_pipeline(), Video(frames, Fraction(25)), SOURCE, tmp_path, **common)
    found = edit_latents(
        make_pipeline(), inversion, TARGET, method="fatezero", options=BLEND, progress=False
    )
    torch.testing.assert_close(found[1:], found[:1].expand(2, -1, -1, -1), atol=1e-4, rtol=0)


def test_the_late_background_is_the_level_above(inversions: dict[str, InversionFolder]) -> None:
    job = job_of(inversions["ddim"], TARGET, 7.5)
    for background, level in (("level", 3), ("late", 4)):
        options = dataclasses.replace(BLEND, background=background)
        work = FateZero(job, options)
        with work.running(), torch.no_grad():
            scheduler = sampling_scheduler(job.pipeline, job.num_steps)
            latents = work.begin()
            blended = []
            for step, timestep in enumerate(scheduler.timesteps):
                noise = work.predict(step, timestep, latents)
                latents = scheduler.step(noise, timestep, latents).prev_sample
                replaced = work.after_step(step, latents)
                blended.append(replaced is not None)
                if step == 1:
                    assert replaced is not None
                    outside = ~work.kept["masks"].unsqueeze(1).expand_as(latents)
                    assert torch.equal(replaced[outside], job.level(level)[outside])
                    assert torch.equal(replaced[~outside], latents[~outside])
        assert blended == [False, True, True, False, False]  # 1 < step + 1 < 4


def test_presets_and_json_types() -> None:
    style = FateZeroOptions(preset="style", equalize="red")
    assert (style.mapping, style.cross_replace, style.self_replace) == ("refine", 0.8, 0.8)
    assert style.equalize == FateZeroOptions(equalize=["red"]).equalize == {"red": 10.0}
    assert style == dataclasses.replace(FateZeroOptions(equalize={"red": 10}), preset="style")
    shape = FateZeroOptions(preset="shape", mapping="refine", blend_words=[["ring"], "star"])
    assert (shape.mapping, shape.cross_replace, shape.self_replace) == ("refine", 0.5, 0.5)
    assert shape.blend_words == (("ring",), ("star",))
    attribute = FateZeroOptions(preset="attribute")
    assert (attribute.mapping, attribute.cross_replace) == ("replace", 0.5)
    assert FateZeroOptions(self_replace=[0.2, 0.8]).self_bounds == (0.2, 0.8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mapping": "swap"}, "mapping is 'swap'; it must be one of refine, replace"),
        ({"cross_replace": {"a": 2}}, "cross_replace of 'a' is 2"),
        ({"self_replace": (0.8, 0.2)}, "the lesser first"),
        ({"self_replace": (0.1, 0.2, 0.3)}, "the lesser first"),
        ({"equalize": {"a": -1}}, "equalize of 'a' is -1"),
        ({"equalize": 3}, "must be factors by word, or words"),
        ({"equalize": {3: 1}}, "each must be a text"),
        ({"equalize": [["a"]]}, "each must be a text"),
        ({"preset": "colour"}, "preset is 'colour'; it must be one of style, attribute, shape"),
        ({"preset": "style"}, "preset is 'style'; it needs equalize, too: the words"),
        ({"preset": "shape"}, "preset is 'shape'; it needs blend_words, too"),
        ({"blend_words": ["duck"]}, "must be two lists"),
        ({"blend_words": [[], ["a"]]}, "empty list"),
        ({"blend_threshold": 1.0}, "blend_threshold is 1.0"),
        ({"blend_latents": True}, "needs blend_words"),
        ({"store": "tape"}, "store is 'tape'"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FateZeroOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mapping": "replace"}, "'a duck' has 2 words and 'a big swan' has 3"),
        ({"equalize": {"small": 2}}, "no 'small' among the words of 'a big swan'"),
        ({"cross_replace": {"duck": 0.5}}, "no 'duck' among the words of 'a big swan'"),
        ({"blend_words": [["swan"], ["swan"]]}, "no 'swan' among the words of 'a duck'"),
        ({"store": "disk"}, "the inversion is STEM's"),
    ],
)
def test_words_that_are_not_there(
    inversions: dict[str, InversionFolder], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_edit(inversions["stem"], TARGET, method="fatezero", options=options)


def test_a_mask_of_everything_is_warned_of(
    inversions: dict[str, InversionFolder], caplog: pytest.LogCaptureFixture
) -> None:
    options = dataclasses.replace(BLEND, blend_threshold=0.0, blend_latents=False)
    with caplog.at_level(logging.WARNING, "stem"):
        _, work = edited(job_of(inversions["ddim"], TARGET, 7.5), options, None)
    assert caplog.text.count("cover 100.0 % of the video") == 1
    assert torch.equal(work.kept["masks"], work.kept["cores"])

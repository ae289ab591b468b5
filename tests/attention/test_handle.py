"""Who a UNet's attention belongs to: guidance branches, others that take over, and threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from pipelines import ONE_LEVEL, call, make_pipeline, make_unet

import stem
from stem import InflatedConfig, SparseCausalConfig, StemConfig

SMALL = StemConfig(num_bases=8, num_frames=4)


def generated(pipeline: Any, **settings: Any) -> torch.Tensor:
    settings = {"height": 16, "width": 16, "num_inference_steps": 2, **settings}
    generator = torch.Generator().manual_seed(0)
    return pipeline(**settings, output_type="latent", generator=generator).images


@pytest.mark.parametrize("make", [StemConfig, SparseCausalConfig, InflatedConfig])
@pytest.mark.parametrize("guidance", [7.5, 1.0])
def test_a_pipeline_s_guidance_branches_are_told_apart(
    make: Callable[..., Any], guidance: float
) -> None:
    pipeline = make_pipeline()
    options = {"num_bases": 8} if make is StemConfig else {}
    with stem.enabled(pipeline, make(**options, num_frames=1)):
        expected = generated(pipeline, prompt="a duck", guidance_scale=guidance)
    with stem.enabled(pipeline, make(**options)):
        found = generated(pipeline, prompt="a duck", guidance_scale=guidance)
    assert torch.equal(found, expected)


def test_frames_that_would_mix_guidance_branches_are_an_error() -> None:
    pipeline = make_pipeline()
    for frames, prompts in ((2, ["a"]), (4, ["a", "b"])):
        with (
            stem.enabled(pipeline, StemConfig(num_bases=8, num_frames=frames)),
            pytest.raises(ValueError, match=rf"2 guidance branches known.*num_frames={frames}"),
        ):
            generated(pipeline, prompt=prompts)
    # The UNet by itself knows of no guidance, also after a call that had some.
    with stem.enabled(pipeline.unet, StemConfig(num_bases=8, num_frames=3)):
        assert call(pipeline.unet, rows=3).isfinite().all()


def test_what_cannot_be_known_is_an_error() -> None:
    pipeline = make_pipeline()
    with stem.enabled(pipeline), pytest.raises(ValueError, match="enable with num_frames"):
        generated(pipeline, prompt=["a duck", "a swan"])
    for target, rows in ((pipeline.unet, 2), (pipeline.unet, 8), (make_pipeline("sd2"), 3)):
        unet, shape = (target, "sd1") if target is pipeline.unet else (target.unet, "sd2")
        with stem.enabled(target), pytest.raises(ValueError, match="enable with num_frames"):
            call(unet, shape, rows=rows)
        with stem.enabled(target):
            assert call(unet, shape, rows=1).isfinite().all()


def test_a_compiled_pipeline_tells_them_apart_too() -> None:
    pipeline = make_pipeline()
    pipeline.unet = make_unet(**ONE_LEVEL)
    with stem.enabled(pipeline, StemConfig(num_bases=8)):
        expected = generated(pipeline, prompt="a duck")
        plain, torch._dynamo.config.suppress_errors = pipeline.unet, False
        torch._dynamo.reset()
        try:
            pipeline.unet = torch.compile(plain, backend="eager", fullgraph=True)
            compiled = generated(pipeline, prompt="a duck")
        finally:
            pipeline.unet = plain
    assert float((compiled - expected).norm() / expected.norm()) < 1e-4


TAKEOVERS: dict[str, Callable[[Any], None]] = {
    "SlicedAttnProcessor": lambda unet: unet.set_attention_slice("auto"),
    "FusedAttnProcessor2_0": lambda unet: unet.fuse_qkv_projections(),
    "AttnProcessor": lambda unet: unet.set_attn_processor(AttnProcessor()),
}


@pytest.mark.parametrize("other", TAKEOVERS)
@pytest.mark.parametrize("config", [SMALL, SparseCausalConfig(num_frames=4)])
def test_a_takeover_is_seen_and_named_once(
    other: str, config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    unet = make_unet()
    handle = stem.enable(unet, config)
    inside = call(unet)
    assert not caplog.text
    TAKEOVERS[other](unet)
    assert not handle.active
    assert not torch.equal(call(unet), inside)
    call(unet)
    warnings = [record.getMessage() for record in caplog.records if record.name == "stem"]
    assert len(warnings) == 1
    assert f"off in 7 of 7 self-attentions: {other} took over" in warnings[0]
    again = stem.enable(unet, config)
    assert again.active
    # Slicing and AttnProcessor round the cross-attentions otherwise.
    assert torch.allclose(call(unet), inside, atol=1e-4)
    again.disable()


def test_fused_disabled_and_unfused_it_is_off() -> None:
    unet = make_unet()
    before, processors = call(unet), dict(unet.attn_processors)
    handle = stem.enable(unet, SMALL)
    unet.fuse_qkv_projections()
    handle.disable()
    unet.unfuse_qkv_projections()
    assert all(unet.attn_processors[name] is old for name, old in processors.items())
    assert torch.equal(call(unet), before)


def test_one_layer_taken_over_is_not_active() -> None:
    unet = make_unet()
    handle = stem.enable(unet, SMALL)
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    ours = layer.processor
    layer.set_processor(AttnProcessor())
    assert not handle.active
    layer.set_processor(ours)
    assert handle.active


def test_an_attention_backend_leaves_it_on() -> None:
    unet = make_unet()
    handle = stem.enable(unet, SMALL)
    inside = call(unet)
    unet.set_attention_backend("native")
    assert handle.active is torch.equal(call(unet), inside)


def in_another_thread(work: Callable[[], object]) -> BaseException | None:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=run, name="second")
    thread.start()
    thread.join()
    return caught[0] if caught else None


def test_a_second_thread_is_refused_and_all_is_restored() -> None:
    unet = make_unet()
    before, processors = call(unet), dict(unet.attn_processors)

    def enabled() -> None:
        with stem.enabled(unet, SMALL):
            pass

    with stem.enabled(unet, SMALL) as handle:
        for intrusion in (
            enabled,
            lambda: stem.enable(unet, SMALL),
            lambda: stem.disable(unet),
            handle.disable,
            lambda: call(unet),
        ):
            error = in_another_thread(intrusion)
            assert error is not None
            assert "thread 'MainThread' has changed this UNet's attention" in str(error)
        assert handle.active
    assert in_another_thread(enabled) is None
    assert torch.equal(call(unet), before)
    assert all(unet.attn_processors[name] is old for name, old in processors.items())


def test_many_threads_leave_nothing_behind() -> None:
    unet = make_unet()
    processors = dict(unet.attn_processors)
    refused: list[str] = []

    def work() -> None:
        for _ in range(20):
            try:
                with stem.enabled(unet, SMALL) as handle:
                    assert handle.active
            except RuntimeError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("with` block" in text for text in refused)
    assert all(unet.attn_processors[name] is old for name, old in processors.items())
    assert not unet._forward_pre_hooks


@pytest.mark.parametrize("guidance", [7.5, 1.0])
@pytest.mark.parametrize("scale", [3.0, 0.0])
def test_perturbed_attention_guidance_is_a_branch(guidance: float, scale: float) -> None:
    parts = make_pipeline.__wrapped__().components  # a call that fails leaves its processors there
    pipeline = StableDiffusionPAGPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    given = {"prompt": "a duck", "guidance_scale": guidance, "pag_scale": scale}
    with stem.enabled(pipeline, StemConfig(num_bases=8, num_frames=1)):
        expected = generated(pipeline, **given)
    with stem.enabled(pipeline, StemConfig(num_bases=8)):
        assert torch.equal(generated(pipeline, **given), expected)
    branches = (2 if guidance > 1 else 1) + (scale > 0)
    with (
        stem.enabled(pipeline, StemConfig(num_bases=8, num_frames=5)),
        pytest.raises(ValueError, match=rf"of {branches} rows \({branches} guidance branch"),
    ):
        generated(pipeline, **given)


@pytest.mark.parametrize(("guidance", "of_image"), [(7.5, 1.5), (7.5, 0.5), (1.0, 1.5)])
def test_instructions_have_three_branches(guidance: float, of_image: float) -> None:
    parts = make_pipeline().components
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel.from_config(parts["unet"].config, in_channels=8).eval()
    pipeline = StableDiffusionInstructPix2PixPipeline(
        **{**parts, "unet": unet}, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    found = []
    for config in (StemConfig(num_bases=8, num_frames=1), StemConfig(num_bases=8)):
        with stem.enabled(pipeline, config):
            found.append(
                pipeline(
                    "make it red",
                    image=torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16),
                    guidance_scale=guidance,
                    image_guidance_scale=of_image,
                    num_inference_steps=2,
                    output_type="latent",
                    generator=torch.Generator().manual_seed(0),
                ).images
            )
    assert torch.equal(*found)

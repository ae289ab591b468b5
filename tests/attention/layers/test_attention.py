"""STEM in a UNet: its formula, by video and timestep, in any dtype, with LoRA, compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipelines import ONE_LEVEL, SMALL, call, make_pipeline, make_unet, unet_inputs

import stem
from stem import InflatedConfig, StemConfig
from stem.attention import Recording, Replay
from stem.attention.families import self_attentions
from stem.attention.layers import processor
from stem_kernels import basis_attention
from stem_kernels.shared.spread import spread_tokens
from stem_kernels.testing import max_error


def test_on_a_cpu_few_frames_at_a_time_attend(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = make_unet()
    attention = next(iter(self_attentions(unet).values()))
    tokens = torch.randn(10, 20, 32, generator=torch.Generator().manual_seed(0))
    sizes = []

    def seen(layer: Any, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        sizes.append(given[0].shape[:2].numel())

    found = {}
    with stem.enabled(unet, StemConfig(num_bases=5, calibration="none", num_frames=5)):
        attention.to_q.register_forward_hook(seen)
        for at_once in (10**6, 80, 1):
            monkeypatch.setattr(processor, "TOKENS_AT_ONCE", at_once)
            with torch.no_grad():
                found[at_once] = attention(tokens)
        graded = attention(tokens)
    # Frames of both videos: all of them, two of each at a time, one, and all for gradients.
    assert sizes == [10, 4, 4, 2, 2, 2, 2, 2, 2, 10]
    for other in (found[80], found[1], graded):
        assert max_error(found[10**6], other) < 1e-6


@pytest.mark.parametrize("space", ["feature", "key"])
@pytest.mark.parametrize("sample", [None, 8])
@pytest.mark.parametrize("calibration", ["none", "moments"])
@pytest.mark.parametrize(("num_iters", "proportional"), [(1, False), (1, True), (2, True)])
def test_one_self_attention_follows_the_formula(
    num_iters: int, proportional: bool, calibration: str, sample: int | None, space: str
) -> None:
    unet = make_unet()
    attention = next(iter(self_attentions(unet).values()))
    tokens = torch.randn(3, 20, 32, generator=torch.Generator().manual_seed(0))
    config = StemConfig(
        num_bases=5,
        num_iters=num_iters,
        temperature=0.7,
        empty="zero",
        proportional=proportional,
        calibration=calibration,
        sample_per_base=sample,
        space=space,
        num_frames=3,
    )
    with stem.enabled(unet, config), torch.no_grad():
        found = attention(tokens)
    with torch.no_grad():
        x = tokens.reshape(60, 32).double()
        weights = {n: p.double() for n, p in attention.named_parameters()}

        def projected(which: str, rows: torch.Tensor) -> torch.Tensor:
            every = rows @ weights[f"to_{which}.weight"].T
            return every.unflatten(-1, (attention.heads, -1)).transpose(0, 1)

        # [60, ...]: the tokens that EM reads, and their keys and values
        read = x if sample is None else x[spread_tokens(60, 5 * sample, x.device)]
        keys, values = projected("k", read), projected("v", read)
        points = read if space == "feature" else keys
        # Iterations before the last read every second token of a sample.
        early = points if sample is None or num_iters == 1 else points[..., ::2, :]
        centres = early[..., spread_tokens(early.shape[-2], 5, x.device), :]
        for iteration in range(num_iters):
            seen = points if iteration == num_iters - 1 else early
            directions = centres / (centres.norm(dim=-1, keepdim=True) + 1e-4)
            z = torch.softmax(seen @ directions.mT / 0.7, -1)
            shares = (z / (z.sum(-2, keepdim=True) + 1e-4)).mT
            centres = shares @ seen
        if space == "feature":
            k, v = projected("k", shares @ read), projected("v", shares @ read)
        else:
            k, v = shares @ keys, shares @ values
        q, mass = projected("q", x), z.sum(-2)
        scale = q.shape[-1] ** -0.5
        bias = mass.log().unsqueeze(-2) if proportional else 0.0
        mixed = torch.softmax(q @ k.mT * scale + bias, -1) @ v
        if calibration == "moments":
            directions = centres / (centres.norm(dim=-1, keepdim=True) + 1e-4)
            z = torch.softmax(points @ directions.mT / 0.7, -1)
            of_keys, of_values = keys - z @ k, values - z @ v
            asking = projected("q", read[::4])
            spread = (scale * asking @ of_keys.mT).square().mean((-1, -2), keepdim=True)
            within = of_keys.mT @ of_values / len(read)
            mixed = mixed + 0.85 / (1 + spread).sqrt() * scale * q @ within
        expected = mixed.transpose(0, 1).flatten(1) @ weights["to_out.0.weight"].T
        expected = (expected + weights["to_out.0.bias"]).reshape(3, 20, 32)
    assert max_error(found, expected) < 1e-6


@pytest.mark.parametrize("space", ["feature", "key"])
@pytest.mark.parametrize("init", ["gaussian", "tokens"])
def test_each_video_of_a_batch_has_its_own_bases(space: str, init: str) -> None:
    unet = make_unet()
    # At tau = 0.01 the rounding of another batch size alone moves assignments.
    config = StemConfig(
        num_bases=8, num_iters=2, temperature=0.1, num_frames=2, space=space, init=init
    )
    (sample, timestep, text), keywords = unet_inputs(rows=6)
    with stem.enabled(unet, config), torch.no_grad():
        together = unet(sample, timestep, text, **keywords)[0]
        alone = [
            unet(sample[rows : rows + 2], timestep, text[rows : rows + 2], **keywords)[0]
            for rows in (0, 2, 4)
        ]
    assert max_error(together, torch.cat(alone)) < 1e-5


def test_a_video_is_seen_whole() -> None:
    unet = make_unet()
    (sample, timestep, text), keywords = unet_inputs(rows=4)
    changed = sample.clone()
    changed[3] += 1.0
    for config, reached in ((SMALL, True), (InflatedConfig(num_frames=4), True), (None, False)):
        with torch.no_grad(), stem.enabled(unet, config) if config else torch.no_grad():
            first, second = (unet(x, timestep, text, **keywords)[0] for x in (sample, changed))
        assert (max_error(first[0], second[0]) > 1e-4) is reached


def test_proportional_bases_with_one_per_token_are_all_frame_attention() -> None:
    unet = make_unet()
    # With a base on every token and an almost hard assignment, K = n is dense attention.
    config = StemConfig(
        num_bases=2 * 64, num_iters=1, temperature=1e-4, proportional=True, num_frames=2
    )
    attention = next(iter(self_attentions(unet).values()))
    tokens = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))
    tokens = tokens / tokens.norm(dim=-1, keepdim=True)
    with torch.no_grad():
        with stem.enabled(unet, config):
            ours = attention(tokens)
        with stem.enabled(unet, InflatedConfig(num_frames=2)):
            dense = attention(tokens)
        plain = attention(tokens)
    assert max_error(ours, dense) < 1e-4
    assert max_error(plain, dense) > 1e-3


def test_seeding_by_timestep_and_the_global_state() -> None:
    unet = make_unet()
    state = torch.random.get_rng_state()
    with stem.enabled(unet, StemConfig(num_bases=8, init="gaussian", num_frames=4)):
        first, again = call(unet), call(unet)
        later = call(unet, timestep=502)
    with stem.enabled(unet, StemConfig(num_bases=8, init="gaussian", seed=1, num_frames=4)):
        reseeded = call(unet)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert not torch.equal(first, reseeded)


def test_replayed_bases_take_the_place_of_em() -> None:
    unet = make_unet()
    with stem.enabled(unet, StemConfig(num_bases=8, space="key", num_frames=4)) as handle:
        recording = Recording()
        with handle.hooks.added("recording", recording):
            expected = call(unet)
        replay = Replay(recording.found)
        handle.hooks.add("replay", replay)
        assert torch.equal(call(unet), expected)
        assert not torch.equal(call(unet, timestep=1), expected)
        replay.found = {0: recording.found[0]}
        with pytest.raises(ValueError, match=r"hold layers \[0\], not layer 1"):
            call(unet)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    unet = make_unet()
    (sample, timestep, text), keywords = unet_inputs()
    config = StemConfig(num_bases=8, temperature=1.0, num_frames=4)
    with stem.enabled(unet, config), torch.no_grad():
        exact = unet(sample, timestep, text, **keywords)[0]
    unet.to(dtype)
    with stem.enabled(unet, config), torch.no_grad():
        half = unet(sample.to(dtype), timestep, text.to(dtype), **keywords)[0]
    assert half.dtype == dtype
    relative = float((half.float() - exact).norm() / exact.norm())
    assert relative < (0.02 if dtype == torch.float16 else 0.1)


@pytest.mark.parametrize("empty", ["mask", "reseed"])
def test_autocast_does_not_reach_into_the_operators(empty: str) -> None:
    unet = make_unet()
    attention = next(iter(self_attentions(unet).values()))
    tokens = torch.randn(3, 20, 32, generator=torch.Generator().manual_seed(0))
    config = StemConfig(num_bases=8, num_iters=2, temperature=1.0, empty=empty, num_frames=3)
    with torch.no_grad(), stem.enabled(unet, config):
        exact = attention(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            assert call(unet, rows=3).isfinite().all()
            cast = attention(tokens)
    # bfloat16 has 8 bits: the projections alone round by some 2^-8.
    assert float((cast.float() - exact).norm() / exact.norm()) < 0.02
    query = torch.randn(1, 2, 50, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = basis_attention(query, query, query)
    assert torch.equal(inside, basis_attention(query, query, query))


def test_lora_counts_and_stays() -> None:
    from peft import LoraConfig

    unet = make_unet()
    plain = call(unet)
    with stem.enabled(unet, SMALL):
        without = call(unet)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet.add_adapter(
            LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights="gaussian")
        )
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
    adapted = call(unet)
    assert not torch.equal(adapted, plain)
    for space in ("feature", "key"):
        with stem.enabled(unet, StemConfig(num_bases=8, num_iters=2, space=space, num_frames=4)):
            assert max_error(call(unet), without) > 1e-3
    assert torch.equal(call(unet), adapted)


@pytest.mark.parametrize("init", [pytest.param("gaussian", marks=pytest.mark.long), "tokens"])
def test_a_compiled_unet_keeps_working(init: str) -> None:
    unet = make_unet(**ONE_LEVEL)
    before = call(unet)
    config = StemConfig(num_bases=8, num_iters=2, init=init, num_frames=4)
    with stem.enabled(unet, config):
        expected = [call(unet, timestep=t) for t in (501, 481, 461)]
    torch._dynamo.reset()
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    assert max_error(call(compiled), before) < 1e-5
    with stem.enabled(compiled, config):
        for timestep, eager in zip((501, 481, 461), expected, strict=True):
            assert max_error(call(compiled, timestep=timestep), eager) < 1e-4
    assert max_error(call(compiled), before) < 1e-5
    assert torch.equal(call(unet), before)


def test_a_pipeline_generates_with_guidance() -> None:
    pipeline = make_pipeline()
    settings: dict[str, Any] = {
        "prompt": ["a", "b", "c"],
        "height": 16,
        "width": 16,
        "num_inference_steps": 2,
        "output_type": "latent",
    }

    def generated() -> torch.Tensor:
        return pipeline(**settings, generator=torch.Generator().manual_seed(0)).images

    before = generated()
    with stem.enabled(pipeline, StemConfig(num_bases=8, num_frames=3)):
        assert not torch.equal(generated(), before)
    assert torch.equal(generated(), before)

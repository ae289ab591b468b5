"""A video in chunks: the same as in one batch, whatever meets, fails or runs out of memory."""

from __future__ import annotations

import dataclasses
import gc
import itertools
from typing import Any

import pytest
import torch
from greenlet import getcurrent, greenlet
from pipelines import SHAPES, call, make_pipeline, make_unet, unet_inputs

import stem
from stem import InflatedConfig, PerFrameConfig, SparseCausalConfig, StemConfig
from stem.attention import Recording, Replay
from stem.attention.chunks import spread_frames
from stem.attention.families import self_attentions
from stem.attention.layers import shared_em
from stem.attention.layers import stem as stem_module
from stem.attention.layers.exchange import Lockstep

pytestmark = pytest.mark.thinned

FRAMES = 8


def output(unet: Any, config: Any, shape: str = "sd1", branches: int = 2) -> torch.Tensor:
    with stem.enabled(unet, config):
        return call(unet, shape, rows=branches * FRAMES)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


OPTIONS = [
    *itertools.product(
        ["feature", "key"], [1, 5], ["zero", "mask", "reseed"], ["gaussian", "tokens"], [None]
    ),
    *itertools.product(["feature", "key"], [2], ["reseed"], ["gaussian", "tokens"], [4]),
]


@pytest.mark.parametrize(("space", "iterations", "empty", "init", "sample"), OPTIONS)
def test_stem_in_chunks_is_stem_in_one_batch(
    space: str, iterations: int, empty: str, init: str, sample: int | None
) -> None:
    unet = make_unet()
    # The convolutions round a batch of one frame and one of eight apart by 9e-7. At tau = 0.01 that
    # moves assignments, on some CPUs more than on others.
    config = StemConfig(
        num_bases=16,
        num_iters=iterations,
        temperature=0.1,
        space=space,
        empty=empty,
        init=init,
        sample_per_base=sample,
        calibration="none",
        num_frames=FRAMES,
    )
    expected = output(unet, config)
    for chunk in (1, 3):
        assert relative(output(unet, dataclasses.replace(config, chunk=chunk)), expected) < 2e-6
    assert torch.equal(output(unet, dataclasses.replace(config, chunk=FRAMES)), expected)


OTHERS = [
    SparseCausalConfig(num_frames=FRAMES),
    SparseCausalConfig(num_frames=FRAMES, frames=("mid", 2, "last")),
    SparseCausalConfig(num_frames=FRAMES, frames=("mid",), min_channels=64),
    InflatedConfig(num_frames=FRAMES),
    PerFrameConfig(num_frames=FRAMES),
]


@pytest.mark.parametrize("config", OTHERS, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_the_other_mechanisms_in_chunks(config: Any, chunk: int) -> None:
    unet = make_unet()
    expected = output(unet, config)
    assert relative(output(unet, dataclasses.replace(config, chunk=chunk)), expected) < 2e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_unet_and_every_way_to_call_it(shape: str) -> None:
    unet = make_unet(shape)
    config = StemConfig(num_bases=16, num_frames=FRAMES, chunk=3)
    expected = output(unet, dataclasses.replace(config, chunk=None), shape)
    assert relative(output(unet, config, shape), expected) < 2e-6
    (sample, timestep, text), keywords = unet_inputs(shape, rows=2 * FRAMES)
    keywords.pop("return_dict")
    with stem.enabled(unet, config), torch.no_grad():
        found = unet(
            sample, timestep.expand(2 * FRAMES), encoder_hidden_states=text, **keywords
        ).sample
    assert relative(found, expected) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_chunks(dtype: torch.dtype) -> None:
    unet = make_unet().to(dtype)
    (sample, timestep, text), keywords = unet_inputs(rows=FRAMES)
    config = StemConfig(num_bases=16, num_frames=FRAMES, temperature=1.0)
    outputs = []
    for chunk in (None, 3):
        with stem.enabled(unet, dataclasses.replace(config, chunk=chunk)), torch.no_grad():
            outputs.append(unet(sample.to(dtype), timestep, text.to(dtype), **keywords)[0].float())
    assert relative(outputs[1], outputs[0]) < (2e-2 if dtype == torch.bfloat16 else 3e-3)


def test_off_again_it_is_bit_identical() -> None:
    unet = make_unet()
    before = call(unet)
    with stem.enabled(unet, StemConfig(num_bases=8, num_frames=4, chunk=1)) as handle:
        assert handle.active
        assert handle.chunk == 1
        call(unet)
    assert "forward" not in unet.__dict__
    assert torch.equal(call(unet), before)
    hooked = unet.forward
    unet.forward = lambda *args, **kwargs: hooked(*args, **kwargs)  # as accelerate's hooks do
    theirs = unet.forward
    with stem.enabled(unet, StemConfig(num_bases=8, num_frames=4, chunk=1)):
        call(unet)
    assert unet.forward is theirs


def test_enabling_again_replaces_the_chunks() -> None:
    unet = make_unet()
    config = StemConfig(num_bases=8, num_frames=4, chunk=2)
    with stem.enabled(unet, config):
        expected = call(unet)
    stem.enable(unet, dataclasses.replace(config, chunk=1))
    handle = stem.enable(unet, config)
    assert torch.equal(call(unet), expected)
    handle.disable()
    assert "forward" not in unet.__dict__


def test_bases_are_recorded_and_replayed_in_chunks() -> None:
    unet = make_unet()
    config = StemConfig(num_bases=8, num_frames=4, chunk=3, space="key")
    with stem.enabled(unet, config) as handle:
        recording = Recording()
        with handle.hooks.added("recording", recording):
            expected = call(unet)
        handle.hooks.add("replay", Replay(recording.found))
        assert torch.equal(call(unet), expected)


def test_a_pipeline_generates_in_chunks_with_guidance() -> None:
    pipeline = make_pipeline()
    found = []
    for chunk in (None, 2):
        with stem.enabled(pipeline, StemConfig(num_bases=8, num_frames=3, chunk=chunk)):
            found.append(
                pipeline(
                    ["a", "b", "c"],
                    height=16,
                    width=16,
                    num_inference_steps=2,
                    output_type="latent",
                    generator=torch.Generator().manual_seed(0),
                ).images
            )
    assert relative(found[1], found[0]) < 1e-4


def test_a_compiled_unet_runs_in_chunks() -> None:
    unet = make_unet()
    config = StemConfig(num_bases=8, num_frames=4, chunk=2)
    with stem.enabled(unet, config):
        expected = call(unet)
    torch._dynamo.reset()
    compiled = torch.compile(unet, backend="aot_eager")
    with stem.enabled(compiled, config):
        assert torch.equal(call(compiled), expected)


class Interrupted(BaseException):
    """Stands for Ctrl-C in the middle of a pass."""


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Interrupted])
@pytest.mark.parametrize("at", [1, 5, 9])
def test_a_chunk_that_fails_ends_all_of_them(
    error: type[BaseException], at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = make_unet()
    before, processors = call(unet), dict(unet.attn_processors)
    calls = 0
    statistics = shared_em.em_statistics

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error("in the middle")
        return statistics(*args, **kwargs)

    monkeypatch.setattr(shared_em, "em_statistics", failing)
    config = StemConfig(num_bases=8, sample_per_base=None, num_frames=4, chunk=1)
    with pytest.raises(error, match="in the middle"), stem.enabled(unet, config):
        call(unet)
    gc.collect()
    living = [thing for thing in gc.get_objects() if type(thing) is greenlet and thing]
    assert living in ([], [getcurrent()])
    assert torch.equal(call(unet), before)
    assert all(unet.attn_processors[name] is old for name, old in processors.items())
    with stem.enabled(unet, config):
        assert call(unet).isfinite().all()


def test_running_out_of_memory_halves_the_chunk(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unet = make_unet()
    config = StemConfig(num_bases=8, num_frames=FRAMES, chunk=7)
    expected = output(unet, dataclasses.replace(config, chunk=2))
    forward = type(unet).forward

    def small(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if sample.shape[0] > 2 * 2:
            raise torch.OutOfMemoryError("no memory for so many rows")
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(type(unet), "forward", small)
    with stem.enabled(unet, config) as handle:
        found = call(unet, rows=2 * FRAMES)
        assert handle.chunk == 2
    assert torch.equal(found, expected)
    assert "a chunk of 7 frames; going on in chunks of 4" in caplog.text
    assert "a chunk of 4 frames; going on in chunks of 2" in caplog.text
    caplog.clear()
    monkeypatch.setattr(
        type(unet),
        "forward",
        lambda self, *args, **kwargs: (_ for _ in ()).throw(torch.OutOfMemoryError("none at all")),
    )
    with stem.enabled(unet, config), pytest.raises(torch.OutOfMemoryError, match="none at all"):
        call(unet, rows=2 * FRAMES)


def test_fit_frames_are_stem_on_those_frames() -> None:
    unet = make_unet()
    config = StemConfig(num_bases=16, num_frames=FRAMES, fit_frames=3)
    (sample, timestep, text), keywords = unet_inputs(rows=2 * FRAMES)
    fit = spread_frames(range(FRAMES), 3)
    assert fit == [1, 4, 6]
    rows = [branch * FRAMES + frame for branch in (0, 1) for frame in fit]
    alone = StemConfig(num_bases=16, num_frames=3)
    with torch.no_grad():
        with stem.enabled(unet, alone) as handle:
            recording = Recording()
            handle.hooks.add("recording", recording)
            expected = unet(sample[rows], timestep, text[rows], **keywords)[0]
        with stem.enabled(unet, StemConfig(num_bases=16, num_frames=FRAMES)) as handle:
            handle.hooks.add("replay", Replay(recording.found))
            others = unet(sample, timestep, text, **keywords)[0]
    for chunk in (None, 1, 2, 8):
        found = output(unet, dataclasses.replace(config, chunk=chunk))
        assert relative(found[rows], expected) < 2e-6
        assert relative(found, others) < 2e-6
    all_frames = output(unet, dataclasses.replace(config, fit_frames=FRAMES))
    assert relative(all_frames, output(unet, StemConfig(num_bases=16, num_frames=FRAMES))) < 2e-6


def test_frames_are_spread_evenly() -> None:
    assert spread_frames(range(64), 4) == [8, 24, 40, 56]
    assert spread_frames(range(3), 8) == [0, 1, 2]
    assert spread_frames(range(5), 1) == [2]
    assert spread_frames(range(10, 15), 2) == [11, 13]


def test_chunks_that_part_ways_are_an_error() -> None:
    exchange = Lockstep(range(4), 2)

    def runs(frames: list[int]) -> tuple[torch.Tensor]:
        if frames[0] == 0:
            exchange.meet((torch.zeros(1),), lambda parts: parts)
        return (torch.zeros(1),)

    with pytest.raises(RuntimeError, match="wait for others that have ended"):
        exchange.run(runs)


@pytest.fixture
def layers_seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    original = shared_em.shared_em

    def counting(exchange: Lockstep, *args: Any) -> Any:
        seen.append(exchange.number)
        return original(exchange, *args)

    monkeypatch.setattr("stem.attention.layers.stem.shared_em", counting)
    return seen


def test_chunks_take_turns_layer_by_layer(layers_seen: list[int]) -> None:
    unet = make_unet()
    config = StemConfig(num_bases=8, sample_per_base=None, num_frames=6, chunk=2)
    with stem.enabled(unet, config):
        call(unet, rows=6)
    assert layers_seen == [0, 1, 2] * len(self_attentions(unet))


@pytest.mark.parametrize("space", ["feature", "key"])
@pytest.mark.parametrize("sample_per_base", [4, 10_000], ids=["sample", "short video"])
def test_em_on_a_sample_meets_once_and_runs_once_a_layer(
    sample_per_base: int, space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet, runs, meetings = make_unet(), [], []
    em, meet = stem_module.attended_bases, Lockstep.meet

    def counted(features: torch.Tensor, *arguments: Any, **settings: Any) -> Any:
        runs.append(features.shape[-2])
        return em(features, *arguments, **settings)

    def met(exchange: Lockstep, *arguments: Any, **settings: Any) -> Any:
        meetings.append(exchange.number)
        return meet(exchange, *arguments, **settings)

    monkeypatch.setattr(stem_module, "attended_bases", counted)
    monkeypatch.setattr(Lockstep, "meet", met)
    layers = len(self_attentions(unet))
    config = StemConfig(
        num_bases=4, sample_per_base=sample_per_base, space=space, num_frames=6, chunk=2
    )
    with stem.enabled(unet, config):
        call(unet, rows=6)
    found = list(runs)
    assert meetings == [0, 1, 2] * layers
    runs.clear()
    with stem.enabled(unet, dataclasses.replace(config, chunk=None)):
        call(unet, rows=6)
    assert len(found) == layers
    assert found == runs
    assert found == [16] * layers if sample_per_base == 4 else min(found) > 16


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_the_sample_is_the_same_in_any_chunks(chunk: int) -> None:
    features = torch.randn(2, 6 * 9, 5, generator=torch.Generator().manual_seed(0))
    whole = shared_em.of_spread_tokens(features, 20, None, lambda tokens: tokens)
    exchange = Lockstep(range(6), chunk)

    def find(frames: list[int]) -> tuple[torch.Tensor]:
        mine = features.unflatten(1, (6, 9))[:, frames].flatten(1, 2)
        found = shared_em.of_spread_tokens(mine, 20, exchange, lambda tokens: tokens)
        assert torch.equal(found, whole)
        return (mine,)

    (joined,) = exchange.run(find, dim=1)
    assert torch.equal(joined, features)


@pytest.mark.parametrize("config", [
    StemConfig(num_bases=4, sample_per_base=4),
    StemConfig(num_bases=4, sample_per_base=None, empty="reseed"),
    StemConfig(num_bases=4, calibration="linear", num_queries=8, key_share=0.5),
], ids=["sample", "reseed", "calibration"])  # fmt: skip
def test_which_tokens_a_chunk_has_is_found_once(
    config: StemConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU it takes kernels and a wait for each chunk of each layer."""
    unet, found = make_unet(), []
    spread = shared_em.spread_tokens

    def counted(*arguments: Any, **settings: Any) -> torch.Tensor:
        found.append(arguments)
        return spread(*arguments, **settings)

    monkeypatch.setattr(shared_em, "_known", {})
    monkeypatch.setattr(shared_em, "spread_tokens", counted)
    with stem.enabled(unet, dataclasses.replace(config, num_frames=6, chunk=2)):
        first = call(unet, rows=6)
        assert found
        found.clear()
        second = call(unet, rows=6)
    assert not found
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StemConfig(chunk=4), "chunk is 4; it needs num_frames"),
        (lambda: StemConfig(chunk=0, num_frames=4), "chunk is 0; it must be a whole number"),
        (lambda: StemConfig(fit_frames=4), "fit_frames is 4; it needs num_frames"),
        (lambda: PerFrameConfig(chunk=2), "chunk is 2; it needs num_frames"),
    ],
)
def test_configurations_that_do_not_fit(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

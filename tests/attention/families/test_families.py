"""Every diffusers class that a mechanism goes into: what it changes there, and its undoing."""

from __future__ import annotations

import copy
import dataclasses
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel
from video_models import (
    FRAMES,
    KINDS,
    SIZE,
    call_model,
    make_model,
    model_inputs,
    outputs,
)

import stem
from stem import InflatedConfig, PerFrameConfig, SparseCausalConfig, StemConfig
from stem.attention import Hook, Hooks
from stem.attention.families import FAMILIES, self_attentions
from stem.attention.layers.hooks import Site

pytestmark = pytest.mark.thinned

WITH_AXIS = [kind for kind, described in KINDS.items() if described.frame_axis is not None]
OF_ROWS = [kind for kind in KINDS if kind not in WITH_AXIS]
# At tau = 0.01 rounding moves assignments on some CPUs.
FEW = StemConfig(num_bases=4, temperature=0.1, num_frames=FRAMES)
TOKENS = FRAMES * SIZE * SIZE
# Every token of the finest level is a base, and every one of the level below four bases.
ALL_TOKENS = StemConfig(
    num_bases=TOKENS,
    num_iters=1,
    temperature=1e-4,
    sample_per_base=None,
    calibration="none",
    num_frames=FRAMES,
)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def spatial_self_attentions(model: torch.nn.Module) -> Iterator[Attention]:
    """Found by the modules around them, not by names."""
    for module in model.modules():
        if isinstance(module, (Transformer2DModel, TransformerSpatioTemporalModel)):
            yield from (block.attn1 for block in module.transformer_blocks)


class AllFrames:
    """Attention of every token to all tokens of its video, written out.

    Args:
        bases: Number of bases that all together are these tokens; None: there are none. The M-step
            divides a base's sum by its mass + 1e-4, which leaves mass / (mass + 1e-4) of a token.
    """

    def __init__(self, bases: int | None) -> None:
        self.bases = bases

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        rows, places, channels = hidden_states.shape
        tokens = hidden_states.reshape(rows // FRAMES, FRAMES * places, channels)
        left = 1.0
        if self.bases is not None:
            mass = FRAMES * places / self.bases
            left = mass / (mass + 1e-4)
        query, key, value = (
            projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projected in (attn.to_q(tokens), attn.to_k(left * tokens), attn.to_v(left * tokens))
        )
        maps = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(-1)
        joined = (maps @ value).transpose(1, 2).flatten(2)
        return attn.to_out[0](joined).reshape(rows, places, -1)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_all_of_them_are_here() -> None:
    assert {kind.partition(" ")[0] for kind in KINDS} == set(FAMILIES)


def test_the_table_in_the_docs_has_a_row_for_each() -> None:
    page = (Path(__file__).parents[3] / "docs" / "architecture.md").read_text()
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| `")]
    found = {cells[0].strip(" `"): cells[-1] for cells in rows if len(cells) == 5}
    assert set(found) == set(FAMILIES)
    for name, family in FAMILIES.items():
        parts = ", ".join(f"`{part}`" for part in family.temporal)
        assert found[name].strip() == (f"no: {parts}" if parts else "yes")


def test_only_spatial_self_attentions_change_and_all_comes_back(kind: str) -> None:
    model, inputs = make_model(kind), model_inputs(kind, videos=2)
    own = dict(model.attn_processors)
    before = call_model(model, inputs)
    spatial = {id(attention) for attention in spatial_self_attentions(model)}
    assert len(spatial) == KINDS[kind].layers
    for config in (FEW, dataclasses.replace(FEW, init="gaussian", space="key")):
        handle = stem.enable(model, config)
        for name, module in model.named_modules():
            if isinstance(module, Attention):
                replaced = type(module.processor).__name__ == "StemProcessor"
                assert replaced == (id(module) in spatial), name
        assert handle.active
        assert relative(call_model(model, inputs), before) > 1e-3
        handle.disable()
        assert all(model.attn_processors[name] is old for name, old in own.items())
        assert torch.equal(call_model(model, inputs), before)


def test_with_a_base_for_every_token_it_is_attention_over_all_frames(kind: str) -> None:
    model, inputs = make_model(kind), model_inputs(kind, videos=2)
    before = call_model(model, inputs)
    reference = make_model(kind)
    in_keys = dataclasses.replace(ALL_TOKENS, space="key")
    for config in (InflatedConfig(num_frames=FRAMES), ALL_TOKENS, in_keys):
        bases = config.num_bases if isinstance(config, StemConfig) else None
        for attention in spatial_self_attentions(reference):
            attention.set_processor(AllFrames(bases))
        expected = call_model(reference, inputs)
        assert relative(before, expected) > 1e-3
        with stem.enabled(model, config):
            assert relative(call_model(model, inputs), expected) < 1e-5


@pytest.mark.parametrize("config", [FEW, SparseCausalConfig(num_frames=FRAMES)])
def test_videos_and_guidance_branches_do_not_mix(kind: str, config: Any) -> None:
    model, both = make_model(kind), model_inputs(kind, videos=2)

    def of(video: int) -> dict[str, Any]:
        def part(given: Any) -> Any:
            if isinstance(given, dict):
                return {name: part(value) for name, value in given.items()}
            return given if given.ndim == 0 else given.unflatten(0, (2, -1))[video]

        return {name: part(value) for name, value in both.items()}

    with stem.enabled(model, config), torch.no_grad():
        joint = outputs(model(**both, return_dict=False))
        for video in (0, 1):
            alone = outputs(model(**of(video), return_dict=False))
            for found, expected in zip(joint, alone, strict=True):
                assert relative(found.unflatten(0, (2, -1))[video], expected) < 1e-5


@pytest.mark.parametrize("kind", WITH_AXIS)
def test_the_sample_says_how_many_frames_there_are(kind: str) -> None:
    model, inputs = make_model(kind), model_inputs(kind, videos=2)
    with stem.enabled(model, FEW):
        expected = call_model(model, inputs)
    with stem.enabled(model, dataclasses.replace(FEW, num_frames=None)):
        assert torch.equal(call_model(model, inputs), expected)
        # The next call may be of another length.
        call_model(model, model_inputs(kind, frames=2))
        assert torch.equal(call_model(model, inputs), expected)
    shape = list(inputs["sample"].shape)
    for frames in (1, 2, 6):
        wrong = pytest.raises(ValueError, match=rf"num_frames is {frames}, .*holds {FRAMES} frames")
        with stem.enabled(model, dataclasses.replace(FEW, num_frames=frames)), wrong as error:
            call_model(model, inputs)
        assert str(shape) in str(error.value)
    with stem.enabled(model, FEW), torch.no_grad():
        call_model(model, inputs)
        attention = next(iter(self_attentions(model).values()))
        with pytest.raises(ValueError, match=r"got 4 rows in a call of 6, so .* cuts the batch"):
            attention(torch.zeros(4, 4, attention.query_dim))
    without = inputs["sample"].select(KINDS[kind].frame_axis, 0)
    with stem.enabled(model, FEW), pytest.raises(ValueError, match="samples of 5 dimensions"):
        call_model(model, {**inputs, "sample": without})


@pytest.mark.parametrize("kind", OF_ROWS)
def test_where_rows_are_frames_somebody_must_say_so(kind: str) -> None:
    model, inputs = make_model(kind), model_inputs(kind)
    with stem.enabled(model), pytest.raises(ValueError, match="enable with num_frames"):
        call_model(model, inputs)
    with (
        stem.enabled(model, dataclasses.replace(FEW, num_frames=2)),
        pytest.raises(ValueError, match="does not divide into videos of num_frames=2"),
    ):
        call_model(model, inputs)


class OneRank:
    """A process group of this process."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


@pytest.mark.parametrize("kind", WITH_AXIS)
def test_temporal_parts_forbid_chunks(kind: str) -> None:
    model = make_model(kind)
    own = dict(model.attn_processors)
    name = type(model).__name__
    chunk = InflatedConfig(num_frames=FRAMES, chunk=2)
    fitted = dataclasses.replace(FEW, fit_frames=2)
    for config, group, given in (
        (chunk, None, "chunk=2"),
        (fitted, None, "fit_frames=2"),
        (FEW, OneRank(), "group"),
    ):
        message = rf"^{given} would cut .* the temporal parts of {name} \(.*leave chunk"
        with pytest.raises(ValueError, match=message):
            stem.enable(model, config, group=group)  # type: ignore[arg-type]
    assert all(model.attn_processors[name] is old for name, old in own.items())
    assert "forward" not in vars(model)


CHUNKED = [
    FEW,
    InflatedConfig(num_frames=FRAMES),
    SparseCausalConfig(num_frames=FRAMES),
    PerFrameConfig(num_frames=FRAMES),
]


@pytest.mark.parametrize("config", CHUNKED, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("kind", OF_ROWS)
def test_rows_that_are_frames_go_through_in_chunks(kind: str, config: Any) -> None:
    model, inputs = make_model(kind), model_inputs(kind, videos=2)
    before = call_model(model, inputs)
    with stem.enabled(model, config):
        expected = call_model(model, inputs)
        whole = model(**inputs)
    for chunk in (1, 2):
        with stem.enabled(model, dataclasses.replace(config, chunk=chunk)):
            assert relative(call_model(model, inputs), expected) < 5e-6
            found = model(**inputs)
    assert type(found) is type(whole)
    for name, part in whole.items():
        shapes = [tensor.shape for tensor in (part if isinstance(part, list) else [part])]
        given = found[name]
        assert type(given) is type(part)
        assert [tensor.shape for tensor in (given if type(part) is list else [given])] == shapes
    assert torch.equal(call_model(model, inputs), before)


@pytest.mark.parametrize("kind", OF_ROWS)
def test_bases_of_some_frames_serve_all(kind: str) -> None:
    model, inputs = make_model(kind), model_inputs(kind, videos=2)
    with stem.enabled(model, FEW):
        expected = call_model(model, inputs)
    with stem.enabled(model, dataclasses.replace(FEW, fit_frames=FRAMES, chunk=2)):
        assert relative(call_model(model, inputs), expected) < 5e-6
    with stem.enabled(model, dataclasses.replace(FEW, fit_frames=2, chunk=2)):
        found = call_model(model, inputs)
    assert found.isfinite().all()
    assert relative(found, expected) > 1e-4


def test_who_took_over_is_seen_and_stays(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = make_model(kind), model_inputs(kind)
    handle = stem.enable(model, FEW)
    inside = call_model(model, inputs)
    assert not caplog.text
    other = AttnProcessor()
    model.set_attn_processor(other)
    assert not handle.active
    assert not torch.equal(call_model(model, inputs), inside)
    call_model(model, inputs)
    (warning,) = (each.getMessage() for each in caplog.records if each.name == "stem")
    layers = KINDS[kind].layers
    assert f"off in {layers} of {layers} self-attentions: AttnProcessor took over" in warning
    handle.disable()
    assert all(processor is other for processor in model.attn_processors.values())


def test_another_thread_must_wait(kind: str) -> None:
    model, errors = make_model(kind), []

    def enable() -> None:
        try:
            stem.enable(model, FEW)
        except RuntimeError as error:
            errors.append(str(error))

    with stem.enabled(model, FEW):
        thread = threading.Thread(target=enable, name="other")
        thread.start()
        thread.join()
    assert len(errors) == 1
    assert "for a `with` block that is still open" in errors[0]


def test_a_deep_copy_goes_its_own_way(kind: str) -> None:
    model, inputs = make_model(kind), model_inputs(kind)
    before = call_model(model, inputs)
    with stem.enabled(model, FEW):
        expected = call_model(model, inputs)
        copied = copy.deepcopy(model)
        if kind in WITH_AXIS:
            # Of a call of the first one, the copy knows nothing.
            free = dataclasses.replace(FEW, num_frames=None)
            stem.enable(model, free)
            call_model(model, model_inputs(kind, frames=2))
    assert torch.equal(call_model(copied, inputs), expected)
    stem.disable(copied)
    assert torch.equal(call_model(copied, inputs), before)
    assert torch.equal(call_model(model, inputs), before)


class Looking(Hook):
    """Keeps the shapes that it sees, and changes nothing."""

    def __init__(self) -> None:
        self.inputs: list[tuple[int, ...]] = []
        self.maps: list[tuple[int, ...]] = []

    def after(self, site: Site, tokens: torch.Tensor, output: torch.Tensor) -> None:
        assert tokens.shape == output.shape
        self.inputs.append(tuple(tokens.shape[:2]))

    def text_maps(self, site: Site, maps: torch.Tensor) -> torch.Tensor:
        self.maps.append(tuple(maps.shape[:2]))
        return maps


def test_hooks_see_videos_and_frames(kind: str) -> None:
    model, inputs = make_model(kind), model_inputs(kind, videos=2)
    with stem.enabled(model, FEW):
        expected = call_model(model, inputs)
    looking = Looking()
    with stem.enabled(model, FEW, hooks=Hooks(looking=looking)):
        assert relative(call_model(model, inputs), expected) < 1e-5
    assert looking.inputs == [(2, FRAMES)] * KINDS[kind].layers
    assert looking.maps == [(2, FRAMES)] * KINDS[kind].layers

"""Hooks in a UNet's attention: what they see, what they change, and that they are gone after."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from pipelines import call, make_unet, unet_inputs

import stem
from stem import InflatedConfig, PerFrameConfig, SparseCausalConfig, StemConfig
from stem.attention import Hook, Hooks, Recording, Replay
from stem.attention.layers.hooks import Attend, Operands, Site

CONFIGS = [
    PerFrameConfig(num_frames=2),
    SparseCausalConfig(num_frames=2),
    SparseCausalConfig.mid(num_frames=2),
    InflatedConfig(num_frames=2),
    # At tau = 0.01 rounding moves assignments on some CPUs.
    StemConfig(num_bases=8, temperature=0.1, num_frames=2),
    StemConfig(num_bases=8, temperature=0.1, num_frames=2, space="key"),
]


class Watching(Hook):
    """Writes down what it is called with, and changes nothing."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def operands(self, site: Site, operands: Operands) -> Operands:
        self.seen.append(("operands", site.name))
        return operands

    def after(self, site: Site, tokens: torch.Tensor, output: torch.Tensor) -> None:
        assert tokens.shape == output.shape
        assert tokens.shape[1] == len(site.frames)
        self.seen.append(("after", site.name))

    def text_maps(self, site: Site, maps: torch.Tensor) -> torch.Tensor:
        torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
        self.seen.append(("text_maps", site.name))
        return maps


def processors(unet: Any) -> list[Any]:
    return list(unet.attn_processors.values())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_hooks_that_only_look_change_nothing(config: Any) -> None:
    unet = make_unet()
    own = processors(unet)
    with stem.enabled(unet, config):
        expected = call(unet)
    watching = Watching()
    with stem.enabled(unet, config, hooks=Hooks(watching=watching)):
        found = call(unet)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    by_kind = {
        kind: [name for at, name in watching.seen if at == kind] for kind, _ in watching.seen
    }
    selves = [name for name, module in unet.named_modules() if name.endswith("attn1")]
    texts = [name for name, module in unet.named_modules() if name.endswith("attn2")]
    assert sorted(by_kind["operands"]) == sorted(by_kind["after"]) == sorted(selves)
    assert sorted(by_kind["text_maps"]) == sorted(texts)
    assert all(now is before for now, before in zip(processors(unet), own, strict=True))


def test_hooks_that_were_replaced_are_called_no_more() -> None:
    unet = make_unet()
    own = processors(unet)
    first, second = Watching(), Watching()
    stem.enable(unet, InflatedConfig(num_frames=2), hooks=Hooks(watching=first))
    stem.enable(unet, InflatedConfig(num_frames=2), hooks=Hooks(watching=second))
    call(unet)
    assert not first.seen
    assert {at for at, _ in second.seen} == {"operands", "after", "text_maps"}
    stem.enable(unet, InflatedConfig(num_frames=2), hooks=Hooks())
    seen = len(second.seen)
    call(unet)
    assert len(second.seen) == seen
    stem.disable(unet)
    assert all(now is before for now, before in zip(processors(unet), own, strict=True))


def test_hooks_do_not_take_the_place_of_an_ip_adapter() -> None:
    unet = make_unet()
    (text,) = (
        module for name, module in unet.named_modules()
        if name == "mid_block.attentions.0.transformer_blocks.0.attn2"
    )  # fmt: skip
    text.set_processor(
        IPAdapterAttnProcessor2_0(text.query_dim, text.cross_attention_dim, num_tokens=(4,))
    )
    with pytest.raises(ValueError, match=r"attn2 has a IPAdapterAttnProcessor2_0 .* unload"):
        stem.enable(unet, PerFrameConfig(num_frames=2), hooks=Hooks())
    stem.enable(unet, StemConfig(num_bases=8, num_frames=2)).disable()


def test_chunks_show_hooks_every_frame_once() -> None:
    unet = make_unet()

    class Frames(Hook):
        def __init__(self) -> None:
            self.seen: dict[str, list[int]] = {}

        def after(self, site: Site, tokens: torch.Tensor, output: torch.Tensor) -> None:
            self.seen.setdefault(site.name, []).extend(site.frames)

    for chunk in (1, 3):
        hook = Frames()
        config = StemConfig(num_bases=8, num_frames=4, chunk=chunk)
        with stem.enabled(unet, config, hooks=Hooks(frames=hook)):
            call(unet)
        assert all(sorted(frames) == [0, 1, 2, 3] for frames in hook.seen.values())


def test_hooks_are_called_in_their_order_and_attend_around_each_other() -> None:
    calls: list[str] = []

    class Named(Hook):
        def __init__(self, name: str) -> None:
            self.name = name

        def attend(self, site: Site, operands: Operands, attend: Attend) -> torch.Tensor:
            calls.append(f"{self.name} begins")
            found = attend(operands)
            calls.append(f"{self.name} ends")
            return found

    unet = make_unet()
    hooks = Hooks(one=Named("one"), two=Named("two"))
    with stem.enabled(unet, PerFrameConfig(), hooks=hooks):
        call(unet, rows=1)
    assert calls[:4] == ["one begins", "two begins", "two ends", "one ends"]


def test_what_comes_before_takes_the_place_of_attention() -> None:
    unet = make_unet()

    class Nothing(Hook):
        def before(self, site: Site, tokens: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(tokens)

        def operands(self, site: Site, operands: Operands) -> Operands:
            raise AssertionError("attention was computed")

    with stem.enabled(unet, InflatedConfig(num_frames=2), hooks=Hooks(nothing=Nothing())):
        assert call(unet).isfinite().all()


@pytest.mark.parametrize("space", ["feature", "key"])
@pytest.mark.parametrize("chunk", [None, 1])
def test_joint_bases_leave_the_first_video_and_serve_equal_ones_equally(
    space: str, chunk: int | None
) -> None:
    unet = make_unet()

    class Joint(Hook):
        joint_bases = True

    (sample, timestep, text), keywords = unet_inputs(rows=6)
    sample[4:] = sample[:2]
    text[4:] = text[:2]
    config = StemConfig(num_bases=8, num_frames=2, space=space, chunk=chunk)
    with torch.no_grad():
        with stem.enabled(unet, config):
            alone = unet(sample, timestep, text, **keywords)[0]
        with stem.enabled(unet, config, hooks=Hooks(joint=Joint())):
            joint = unet(sample, timestep, text, **keywords)[0]
    torch.testing.assert_close(joint[:2], alone[:2], rtol=0, atol=2e-6)
    torch.testing.assert_close(joint[4:], alone[:2], rtol=0, atol=2e-6)
    assert (joint[2:4] - alone[2:4]).abs().max() > 1e-4


def test_names_are_taken_once_and_given_back() -> None:
    hooks = Hooks(one=Recording())
    with pytest.raises(ValueError, match="'one' already"):
        hooks.add("one", Recording())
    with hooks.added("two", Recording()), pytest.raises(ValueError, match="'two'"):
        hooks.add("two", Recording())
    hooks.add("two", Recording())
    assert len(list(hooks)) == 2


def test_a_hook_that_nobody_would_call_is_refused() -> None:
    unet = make_unet()
    config = StemConfig(num_bases=8, num_frames=2)
    with stem.enabled(unet, config) as handle:
        with pytest.raises(ValueError, match=r"has operands, after, text_maps.*hooks=Hooks"):
            handle.hooks.add("watching", Watching())
        handle.hooks.add("recording", Recording())
    recording = Recording()
    with stem.enabled(unet, dataclasses.replace(config, chunk=1), hooks=Hooks(bases=recording)):
        call(unet)
    assert recording.found


def test_bases_of_several_scenes_are_neither_recorded_nor_replayed() -> None:
    unet = make_unet()
    config = StemConfig(num_bases=8, num_frames=4, cuts=(3,))
    with stem.enabled(unet, config) as handle:
        handle.hooks.add("recording", Recording())
        with pytest.raises(ValueError, match=r"of one scene, and cuts is \(3,\)"):
            call(unet, rows=4)


def test_replayed_bases_of_another_form_are_refused() -> None:
    unet, recording = make_unet(), Recording()
    config = StemConfig(num_bases=8, num_frames=4)
    with stem.enabled(unet, config) as handle:
        handle.hooks.add("recording", recording)
        call(unet, rows=4)
    for changes in ({"num_bases": 4}, {"space": "key"}):
        other = dataclasses.replace(config, **changes)  # type: ignore[arg-type]
        with stem.enabled(unet, other) as handle:
            handle.hooks.add("replay", Replay(recording.found))
            with pytest.raises(ValueError, match="with the num_bases and space that they were"):
                call(unet, rows=4)

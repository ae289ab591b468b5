"""What others switch on in a UNet: in chunks it works, or is refused by name."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from diffusers.hooks import (
    FasterCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_faster_cache,
    apply_group_offloading,
    apply_layerwise_casting,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from diffusers.hooks.hooks import HookRegistry
from diffusers.hooks.hooks import ModelHook as DiffusersHook
from pipelines import SMALL, call, make_unet

import stem
from stem import PerFrameConfig, SparseCausalConfig, StemConfig
from stem.attention.others import nobody_looks_in

CHUNKS = dataclasses.replace(SMALL, chunk=2)
CPU = torch.device("cpu")


def wrapped(module: Any) -> None:
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs)


class Keeping(torch.nn.SiLU):
    """A module that is nobody's library's."""

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        self.kept = given
        return super().forward(given)


def another_s_class(unet: Any) -> None:
    block = unet.down_blocks[0].resnets[0]
    block.__class__ = type("Theirs", (type(block),), {"forward": Keeping.forward})


def patched_class(unet: Any) -> None:
    kind = type(unet)
    unet.__class__ = type("Theirs", (kind,), {"forward": lambda self, *a, **k: None})


LOOKING: dict[str, Callable[[Any], Any]] = {
    "forward hook": lambda unet: unet.mid_block.register_forward_hook(lambda *_: None),
    "pre-forward hook": lambda unet: unet.conv_in.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda unet: (
        unet.up_blocks[0].resnets[1].register_full_backward_hook(lambda *_: None)
    ),
    "wrapped block": lambda unet: wrapped(unet.down_blocks[1]),
    "wrapped resnet": lambda unet: wrapped(unet.up_blocks[1].resnets[0]),
    "wrapped unet": wrapped,
    "accelerate": lambda unet: add_hook_to_module(unet.mid_block, ModelHook()),
    "diffusers": lambda unet: HookRegistry.check_if_exists_or_initialize(
        unet.up_blocks[0]
    ).register_hook(DiffusersHook(), "theirs"),
    "layerwise casting": lambda unet: apply_layerwise_casting(
        unet.down_blocks[0], torch.float32, torch.float32
    ),
    "compiled part": lambda unet: unet.mid_block.compile(backend="eager"),
    "compiled module": lambda unet: unet.__setattr__(
        "mid_block", torch.compile(unet.mid_block, backend="eager")
    ),
    "another's class": another_s_class,
    "another's UNet": patched_class,
}


def test_diffusers_own_unet_is_not_looked_into() -> None:
    for shape in ("sd1", "sd2", "sdxl"):
        unet = make_unet(shape)
        assert nobody_looks_in(unet, unet.forward)
    unet.register_forward_hook(lambda *_: None)  # sees what the UNet returns
    assert nobody_looks_in(unet, unet.forward)


@pytest.mark.parametrize("how", LOOKING)
def test_whoever_looks_into_a_unet_is_seen(how: str) -> None:
    unet = make_unet()
    LOOKING[how](unet)
    assert not nobody_looks_in(unet, unet.forward)


def test_a_hook_on_all_modules_is_seen() -> None:
    unet = make_unet()
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not nobody_looks_in(unet, unet.forward)
    finally:
        hook.remove()
    assert nobody_looks_in(unet, unet.forward)


def keeping_storages(module: Any, kept: list[torch.UntypedStorage]) -> None:
    """Keep the storages of what a module puts out, by a wrapper of its forward."""
    forward = module.forward

    @functools.wraps(forward)
    def keeps(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        parts = output[1] if isinstance(output, tuple) else (output,)
        kept.extend(part.untyped_storage() for part in parts)
        return output

    module.forward = keeps


def test_what_a_wrapper_keeps_is_not_freed() -> None:
    unet = make_unet()
    with stem.enabled(unet, CHUNKS):
        expected = call(unet)
    kept: list[torch.UntypedStorage] = []
    keeping_storages(unet.down_blocks[0], kept)
    keeping_storages(unet.mid_block, kept)
    with stem.enabled(unet, CHUNKS):
        assert torch.equal(call(unet), expected)
    assert len(kept) == 2 * (2 + 1)  # chunks; two skip connections of a block, one output
    assert all(storage.nbytes() for storage in kept)


def test_without_a_wrapper_skip_connections_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = make_unet()
    freed = 0
    resize = torch.UntypedStorage.resize_

    def counting(storage: torch.UntypedStorage, size: int) -> Any:
        nonlocal freed
        freed += size == 0
        return resize(storage, size)

    monkeypatch.setattr(torch.UntypedStorage, "resize_", counting)
    with stem.enabled(unet, CHUNKS):
        call(unet)
    # Two chunks, two blocks: each its input and two skip connections.
    assert freed == 2 * 2 * 3


ATTENTION = "transformer_blocks.*attn1"
STATEFUL: dict[str, Callable[[Any], None]] = {
    "PyramidAttentionBroadcastHook": lambda unet: apply_pyramid_attention_broadcast(
        unet,
        PyramidAttentionBroadcastConfig(
            cross_attention_block_skip_range=2, current_timestep_callback=lambda: 500
        ),
    ),
    "FasterCacheDenoiserHook": lambda unet: apply_faster_cache(
        unet,
        FasterCacheConfig(
            spatial_attention_block_identifiers=(ATTENTION,),
            is_guidance_distilled=True,
            current_timestep_callback=lambda: 500,
        ),
    ),
    "TaylorSeerCacheHook": lambda unet: apply_taylorseer_cache(
        unet, TaylorSeerCacheConfig(cache_identifiers=[f".*{ATTENTION}"])
    ),
    "DeepCache": lambda unet: setattr(unet.mid_block, "forward", theirs("DeepCache.extension")),
    "tgate": lambda unet: setattr(unet.mid_block, "forward", theirs("tgate.tgate_utils")),
}


def theirs(module: str) -> Callable[..., Any]:
    """A function that was written in another's module, which need not be installed."""
    written: dict[str, Any] = {"__name__": module}
    exec("def forward(*args, **kwargs): raise AssertionError('called')", written)
    forward: Callable[..., Any] = written["forward"]
    return forward


@pytest.mark.parametrize("cache", STATEFUL)
def test_a_cache_of_one_state_is_refused_in_chunks(cache: str) -> None:
    for config in (
        CHUNKS,
        dataclasses.replace(SMALL, fit_frames=2),
        SparseCausalConfig(num_frames=4, chunk=1),
    ):
        unet = make_unet()
        STATEFUL[cache](unet)
        message = f"{cache} on .* keeps one state for all chunks"
        with stem.enabled(unet, config), pytest.raises(ValueError, match=message):
            call(unet)


@pytest.mark.parametrize("cache", ["PyramidAttentionBroadcastHook", "FasterCacheDenoiserHook"])
@pytest.mark.parametrize("config", [SMALL, dataclasses.replace(SMALL, chunk=4)])
def test_where_all_frames_run_at_once_a_cache_works(cache: str, config: StemConfig) -> None:
    unet = make_unet()
    with stem.enabled(unet, config):
        expected = call(unet)
    STATEFUL[cache](unet)
    with stem.enabled(unet, config):
        assert torch.equal(call(unet), expected)


def offloaded(unet: Any, kind: str, folder: Path | None) -> None:
    apply_group_offloading(
        unet,
        onload_device=CPU,
        offload_device=CPU,
        offload_type=kind,
        num_blocks_per_group=1 if kind == "block_level" else None,
        offload_to_disk_path=None if folder is None else str(folder),
    )


@pytest.mark.parametrize("on_disk", [False, True])
def test_offloading_of_blocks_is_refused_in_chunks(on_disk: bool, tmp_path: Path) -> None:
    unet = make_unet()
    with stem.enabled(unet, CHUNKS):
        expected = call(unet)
    offloaded(unet, "block_level", tmp_path if on_disk else None)
    with stem.enabled(unet, CHUNKS), pytest.raises(ValueError, match="offload_type='leaf_level'"):
        call(unet)
    with stem.enabled(unet, PerFrameConfig(num_frames=4, chunk=2)):
        assert call(unet).isfinite().all()  # such chunks do not meet
    for config in (SMALL, dataclasses.replace(SMALL, chunk=4)):
        with stem.enabled(unet, config):
            found = call(unet)
        assert float((found - expected).norm() / expected.norm()) < 2e-6


@pytest.mark.parametrize("on_disk", [False, True])
def test_offloading_of_layers_works_in_chunks(on_disk: bool, tmp_path: Path) -> None:
    unet = make_unet()
    with stem.enabled(unet, CHUNKS):
        expected = call(unet)
    offloaded(unet, "leaf_level", tmp_path if on_disk else None)
    with stem.enabled(unet, CHUNKS):
        assert torch.equal(call(unet), expected)


def test_accelerate_s_offloading_of_blocks_is_refused_too() -> None:
    unet = make_unet()
    block = unet.down_blocks[0].attentions[0]
    hook = AlignDevicesHook(CPU, offload=True, place_submodules=True)
    add_hook_to_module(block, hook)
    with stem.enabled(unet, CHUNKS), pytest.raises(ValueError, match=r"down_blocks.0.attentions.0"):
        call(unet)


def test_chunks_end_where_others_have_wrapped_them() -> None:
    unet = make_unet()
    expected = call(unet, rows=3)
    with stem.enabled(unet, CHUNKS):
        in_chunks = call(unet)
    handle = stem.enable(unet, CHUNKS)
    offloaded(unet, "leaf_level", None)
    wrapped(unet)
    assert torch.equal(call(unet), in_chunks)
    with stem.enabled(unet, SMALL):  # puts these chunks back at its end
        pass
    assert torch.equal(call(unet), in_chunks)
    handle.disable()
    assert torch.equal(call(unet, rows=3), expected)

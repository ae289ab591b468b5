"""Autocast, grad mode and the like belong to the chunk that put them on."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pipelines import SMALL, call, make_unet, unet_inputs

import stem
from stem.attention.layers.exchange import Lockstep
from stem.attention.layers.settings import Settings


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "no inference_mode": lambda: torch.inference_mode(False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float16": lambda: torch.autocast("cpu", torch.float16, cache_enabled=False),
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
    "another device": lambda: torch.autocast("cuda", torch.bfloat16, enabled=False),
    "default dtype": lambda: default_dtype(torch.float64),
}


@pytest.fixture(autouse=True)
def settings_stay() -> Iterator[None]:
    """The settings of the test's thread, which a fault may not carry to other tests."""
    before = Settings.now()
    yield
    before.set()
    assert Settings.now() == before


@pytest.mark.parametrize("inside", CONTEXTS)
@pytest.mark.parametrize("outside", CONTEXTS)
def test_each_chunk_has_its_own(inside: str, outside: str) -> None:
    exchange = Lockstep(range(3), 1)
    with CONTEXTS[inside]():
        alone = Settings.now()
    seen: list[tuple[str, Settings]] = []

    def merge(parts: Any) -> int:
        seen.append(("merge", Settings.now()))
        return len(parts)

    def chunk(frames: list[int]) -> tuple[torch.Tensor]:
        seen.append(("start", Settings.now()))
        exchange.meet((torch.zeros(1),), merge)
        # Of three chunks one has no context of its own.
        with CONTEXTS[inside]() if frames[0] != 1 else contextlib.nullcontext():
            for _ in range(2):
                before = Settings.now()
                exchange.meet((torch.zeros(1),), merge)
                seen.append(("same" if Settings.now() == before else "other", before))
        seen.append(("end", Settings.now()))
        return (torch.zeros(1),)

    with CONTEXTS[outside]():
        expected = Settings.now()
        exchange.run(chunk)
        assert Settings.now() == expected
    assert len(seen) == 3 * (1 + 2 + 1) + 3
    for when, settings in seen:
        assert when != "other"
        if when != "same":
            assert settings == expected
    own = [settings for when, settings in seen if when == "same"]
    assert own.count(expected) >= 2
    if outside == "enable_grad":
        assert own.count(alone) >= 4


@pytest.mark.parametrize("inside", CONTEXTS)
def test_a_chunk_that_fails_leaves_none_on(inside: str) -> None:
    exchange = Lockstep(range(3), 1)

    def chunk(frames: list[int]) -> tuple[torch.Tensor]:
        with CONTEXTS[inside]():
            exchange.meet((torch.zeros(1),), lambda parts: None)
            if frames[0] == 1:
                raise KeyError("in the middle")
            exchange.meet((torch.zeros(1),), lambda parts: None)
        return (torch.zeros(1),)

    before = Settings.now()
    with pytest.raises(KeyError, match="in the middle"):
        exchange.run(chunk)
    assert Settings.now() == before


def test_what_a_chunk_leaves_on_ends_with_it() -> None:
    exchange = Lockstep(range(2), 1)
    seen = []

    def chunk(frames: list[int]) -> tuple[torch.Tensor]:
        seen.append(torch.is_grad_enabled())
        torch.set_grad_enabled(False)
        return (torch.zeros(1),)

    exchange.run(chunk)
    assert seen == [True, True]
    assert torch.is_grad_enabled()


def test_a_chunk_sees_the_caller_s_context_variables() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    variable.set("the caller's")
    exchange = Lockstep(range(2), 1)
    seen = []

    def chunk(frames: list[int]) -> tuple[torch.Tensor]:
        seen.append(variable.get())
        variable.set("a chunk's")
        exchange.meet((torch.zeros(1),), lambda parts: None)
        return (torch.zeros(1),)

    exchange.run(chunk)
    assert seen == ["the caller's"] * 2
    assert variable.get() == "the caller's"


@pytest.mark.parametrize("context", ["no_grad", "inference_mode", "autocast", "float16"])
def test_a_unet_whose_forward_enters_a_context(context: str) -> None:
    """As accelerate's mixed precision and its inference wrappers have it."""
    unet = make_unet()
    arguments, keywords = unet_inputs(rows=4)
    forward = unet.forward

    def inside(*args: Any, **kwargs: Any) -> Any:
        with CONTEXTS[context]():
            return forward(*args, **kwargs)

    found = []
    for chunk in (None, 4, 1):
        unet.forward = inside
        config = stem.StemConfig(num_bases=8, num_frames=4, chunk=chunk)
        before = Settings.now()
        with stem.enabled(unet, config):
            output = unet(*arguments, **keywords)[0]
            found.append(output.detach().float())
        assert Settings.now() == before
        del unet.forward
    bound = 2e-2 if "auto" in context or "float" in context else 2e-6
    assert float((found[2] - found[0]).norm() / found[0].norm()) < bound
    assert output.requires_grad is ("auto" in context or "float" in context)
    with stem.enabled(unet, SMALL):
        assert call(unet).isfinite().all()

"""Where a layer goes from projection to projection in one kernel, and where it must not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pipelines import make_unet
from torch.utils.flop_counter import FlopCounterMode

import stem
from stem import StemConfig
from stem.attention import Hook, Hooks
from stem.attention.families import self_attentions
from stem.attention.layers import projections
from stem_kernels import cuda
from stem_kernels.testing import max_error

built = pytest.mark.skipif(
    cuda.load_error("cpu") is not None, reason=f"no extension: {cuda.load_error('cpu')}"
)
TOKENS = torch.randn(6, 20, 32, generator=torch.Generator().manual_seed(0))
CONFIG = StemConfig(num_bases=5, num_frames=3, backend="cuda")


@pytest.fixture
def attention() -> Iterator[Any]:
    unet = make_unet()
    with stem.enabled(unet, CONFIG):
        yield next(iter(self_attentions(unet).values()))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the tokens that the kernel is given."""
    found: list[torch.Size] = []
    before = projections.projected_attention

    def noted(tokens: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        found.append(tokens.shape)
        return before(tokens, *rest, **more)

    monkeypatch.setattr(projections, "projected_attention", noted)
    return found


@built
@torch.no_grad()
def test_one_kernel_gives_what_the_steps_give(attention: Any, calls: list[torch.Size]) -> None:
    fused = attention(TOKENS)
    assert calls == [(2, 60, 32)]
    attention.to_q.register_forward_hook(lambda *_: None)
    steps = attention(TOKENS)
    assert len(calls) == 1
    assert max_error(fused, steps) <= 1e-6 * float(steps.abs().max())


class Doubled(torch.nn.Linear):
    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(given)


def doubled(attention: Any) -> None:
    attention.to_q.__class__ = Doubled


def replaced(attention: Any) -> None:
    own = attention.to_out[0].forward
    attention.to_out[0].forward = lambda given: 2 * own(given)


def before_it(attention: Any) -> None:
    attention.to_q.register_forward_pre_hook(lambda _, given: (2 * given[0],))


def with_norm(attention: Any) -> None:
    attention.norm_q = torch.nn.LayerNorm(attention.to_q.out_features // attention.heads)


def dropping(attention: Any) -> None:
    attention.to_out[1] = torch.nn.Dropout(0.5).train()


def after_all(attention: Any) -> None:
    attention.to_out[1].register_forward_hook(lambda *given: 2 * given[-1])


def another_end(attention: Any) -> None:
    attention.to_out[1] = torch.nn.Tanh()


class Halved(torch.nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


def parametrized(attention: Any) -> None:
    torch.nn.utils.parametrize.register_parametrization(attention.to_out[0], "weight", Halved())


@built
@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        doubled, replaced, before_it, with_norm, dropping, after_all, another_end, parametrized,
    ],
)  # fmt: skip
def test_what_else_a_projection_does_is_done(
    change: Callable[[Any], None], attention: Any, calls: list[torch.Size]
) -> None:
    before = attention(TOKENS)
    change(attention)
    torch.manual_seed(0)
    assert max_error(attention(TOKENS), before) > 1e-3
    assert len(calls) == 1


@built
@torch.no_grad()
def test_hooks_of_all_modules_and_dispatch_modes_see_the_steps(
    attention: Any, calls: list[torch.Size]
) -> None:
    seen: list[str] = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module).__name__)
    )
    try:
        attention(TOKENS)
    finally:
        hook.remove()
    assert seen.count("Linear") > 2
    with FlopCounterMode(display=False) as counter:
        attention(TOKENS)
    assert counter.get_total_flops() >= 2 * 2 * 120 * 32 * 32
    assert calls == []


@built
def test_autocast_takes_the_steps(attention: Any, calls: list[torch.Size]) -> None:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(TOKENS).dtype == torch.bfloat16
    assert calls == []


@built
def test_a_gradient_takes_the_steps(calls: list[torch.Size]) -> None:
    unet = make_unet()
    attention: Any = next(iter(self_attentions(unet).values()))
    with stem.enabled(unet, StemConfig(num_bases=5, num_frames=3)):
        attention(TOKENS).square().sum().backward()
        assert calls == []
        assert attention.to_q.weight.grad is not None


class Looking(Hook):
    """Sees inputs and outputs, and leaves the attention alone."""

    def after(self, site: Any, tokens: torch.Tensor, output: torch.Tensor) -> None:
        self.output = output


class Touching(Hook):
    def attend(self, site: Any, operands: Any, attend: Any) -> torch.Tensor:
        return attend(operands)


@built
@torch.no_grad()
def test_only_what_looks_into_the_attention_takes_it_apart(calls: list[torch.Size]) -> None:
    found = []
    looking = Looking()
    for hooks in (Hooks(), Hooks(looking=looking), Hooks(touching=Touching())):
        unet = make_unet()
        with stem.enabled(unet, CONFIG, hooks=hooks):
            found.append(next(iter(self_attentions(unet).values()))(TOKENS))
    assert len(calls) == 2
    assert torch.equal(found[0], found[1])
    assert looking.output.shape == (2, 3, 20, 32)
    assert max_error(found[2], found[0]) <= 1e-6 * float(found[0].abs().max())

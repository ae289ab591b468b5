"""The layer's cases judge answers rightly, where EM reads a sample, too."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases.layers import KINDS, LAYER_KINDS, layer_case


@pytest.mark.parametrize("shape", [(2, 8), (6, 32)], ids=["all tokens", "a sample"])
def test_what_a_layer_gives_is_right(shape: tuple[int, int]) -> None:
    frames, side = shape
    case = layer_case(frames, side, 32, torch.device("cpu"), torch.float32)
    inputs = case.inputs()
    for kind in LAYER_KINDS:
        contender = case.contenders[kind]
        answer = contender.start(inputs)()
        assert contender.check is not None
        assert contender.check(inputs, answer) <= 1, kind
        if KINDS[kind] is not None:
            assert contender.check(inputs, (1.01 * answer[0],)) > 1, kind

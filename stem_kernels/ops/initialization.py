"""Initial bases, and the random numbers behind them."""

from __future__ import annotations

import hashlib

import torch

from ..shared.spread import spread_tokens
from .checks import check_choice, check_count, check_floating, check_seed

OP = "initial_bases"
INITIALIZATIONS = ("gaussian", "tokens")


def standard_normals(timestep: torch.Tensor, sizes: list[int], *, seed: int) -> torch.Tensor:
    """Standard normals for layers 0, 1, ... at one timestep, the same on every device.

    Layer i gets `sizes[i]` numbers from its own generator, which is seeded by SHA-256 of (seed,
    layer, timestep) and draws on the CPU. The global generators of torch are not used.

    Args:
        timestep: Timestep, an integer or floating tensor [...] of at least one element. Its first
            element, truncated, is the timestep. The result is on its device.
        sizes: Number of normals that each layer gets.
        seed: Seed of the generators, a whole number of 64 bits.

    Returns:
        float32 [sum(sizes)], layer after layer.

    Raises:
        ValueError: the seed is no whole number of 64 bits.
    """
    check_seed("standard_normals", seed)
    return torch.ops.stem_kernels.standard_normals(timestep, sizes, seed)


@torch.library.custom_op("stem_kernels::standard_normals", mutates_args=())
def _standard_normals(timestep: torch.Tensor, sizes: list[int], seed: int) -> torch.Tensor:
    when = int(timestep.flatten()[0])
    generator = torch.Generator(device="cpu")
    drawn = []
    for layer, size in enumerate(sizes):
        key = f"{seed}/{layer}/{when}".encode()
        generator.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1)
        drawn.append(torch.randn(size, generator=generator, dtype=torch.float32))
    return torch.cat(drawn).to(timestep.device) if drawn else timestep.new_empty(0).float()


@_standard_normals.register_fake
def _(timestep: torch.Tensor, sizes: list[int], seed: int) -> torch.Tensor:
    return timestep.new_empty(sum(sizes), dtype=torch.float32)


def initial_bases(
    features: torch.Tensor,
    num_bases: int,
    *,
    init: str = "tokens",
    normals: torch.Tensor | None = None,
) -> torch.Tensor:
    """The bases that EM starts from.

    Args:
        features: Tokens [..., n, D], n >= 1.
        num_bases: Number K of bases, at least 1.
        init: Kind of bases. "gaussian": mean + std * normals, per channel, with the mean and the
            unbiased standard deviation over the n tokens (the authors' code; std of one token is
            0). "tokens": K tokens, one from each of K equal stretches, at another place in each
            stretch (tokens repeat if n < K).
        normals: Standard normals for "gaussian", floating, broadcastable to [..., K, D] (see
            `standard_normals`); unused otherwise.

    Returns:
        float32 [..., K, D] (float64 for float64 features).

    Raises:
        ValueError, TypeError: shapes, dtypes or values do not fit, or "gaussian" has no normals.
    """
    check_floating(OP, features=features, normals=normals)
    check_choice(OP, "init", init, INITIALIZATIONS)
    check_count(OP, "num_bases", num_bases)
    num_tokens = features.shape[-2]
    if num_tokens < 1:
        raise ValueError(f"{OP}: features are {list(features.shape)}; there must be a token")
    shape = (*features.shape[:-2], num_bases, features.shape[-1])
    compute = torch.promote_types(features.dtype, torch.float32)
    if init == "tokens":
        index = spread_tokens(num_tokens, num_bases, features.device)
        return features.index_select(-2, index).to(compute)
    if normals is None:
        raise ValueError(f'{OP}: init="gaussian" needs the argument normals')
    try:
        normals = normals.to(compute).expand(shape)
    except RuntimeError as error:
        raise ValueError(
            f"{OP}: normals is {list(normals.shape)}; it must broadcast to {list(shape)}"
        ) from error
    std, mean = torch.std_mean(features, dim=-2, correction=min(1, num_tokens - 1), keepdim=True)
    return mean.to(compute) + std.to(compute) * normals

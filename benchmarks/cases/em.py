"""EM against eager torch, torch.compile and flash-kmeans: one pass, and all iterations."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import NamedTuple

import torch

from stem_kernels import em_statistics, initial_bases, soft_em
from stem_kernels.ops.em_statistics import ROUNDING_ATOL
from stem_kernels.testing import clustered_tokens, eager_em_statistics, eager_soft_em

from .case import Call, Case, Check, Contender, Outputs, UnavailableError, ours, parity, ready
from .floors import Work

NUM_BASES = 256
NUM_ITERS = 5
TEMPERATURE = 0.01
OBJECTIVE_TOLERANCE = 1e-3
EAGER, COMPILED, FLASH_KMEANS = "eager", "eager, torch.compile", "flash-kmeans"
LEAN_EAGER = "eager, divided after the product"
"""The names of contenders. `eager_soft_em` divides responsibilities before the product."""
LARGEST_KEY = 160  # the widest head of SD 1.x
SMALL_TOKENS = 1024  # below it a call is shorter than its launches


class Tokens(NamedTuple):
    """Features [B, n, D], initial bases [B, K, D], and a payload [B, n, D] or None."""

    features: torch.Tensor
    bases: torch.Tensor
    payload: torch.Tensor | None


def em_case(
    shape: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_bases: int = NUM_BASES,
    compiled: bool = False,
    payload: bool = False,
) -> Case[Tokens]:
    """One ST-E + ST-M pass over features [B, n, D]; the key form up to D = 160.

    Args:
        shape: Sizes B, n and D.
        device: Device of the inputs.
        dtype: Type of the features.
        num_bases: Number K of bases.
        compiled: Whether torch.compile is a contender.
        payload: Whether there is one; then the backends compete alone.
    """
    batch, tokens, width = shape

    def run(inputs: Tokens, backend: str) -> Outputs:
        features, bases, ridden = inputs
        return present(em_statistics(features, bases, payload=ridden, backend=backend))

    def start_compiled(inputs: Tokens) -> Call:
        step = torch.compile(eager_em_statistics, dynamic=False)
        return lambda: present(step(inputs.features, inputs.bases))

    contenders = ours(run)
    if not payload:
        contenders[EAGER] = ready(eager_pass)
        if compiled:
            contenders[COMPILED] = Contender(start_compiled)
        if width <= LARGEST_KEY:
            contenders[FLASH_KMEANS] = Contender(start_flash_kmeans, flash_kmeans_error)
    pairs = batch * tokens * num_bases
    products, reads = (6.0, 2) if payload else (4.0, 1)
    return Case(
        f"em {'key' if width <= LARGEST_KEY else 'feature'} d={width}",
        f"B={batch} n={tokens} D={width} K={num_bases}",
        dtype,
        lambda: token_inputs(shape, num_bases, device, dtype, payload=payload),
        contenders,
        pass_check,
        Work(products * pairs * width, pairs, reads * batch * tokens * width * dtype.itemsize),
        graph=tokens <= SMALL_TOKENS,
    )


def token_inputs(
    shape: tuple[int, int, int],
    num_bases: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    payload: bool,
) -> Tokens:
    """Tokens of a shape [B, n, D], and the bases that EM starts from."""
    features = clustered_tokens(shape).to(device, dtype)
    ridden = clustered_tokens(shape, seed=1).to(device, dtype) if payload else None
    return Tokens(features, initial_bases(features, num_bases), ridden)


def eager_pass(inputs: Tokens) -> Outputs:
    """One pass by eager torch."""
    features, bases, payload = inputs
    return present(eager_em_statistics(features, bases, payload=payload))


def pass_check(inputs: Tokens) -> Check:
    """Of a pass against float64, for the first entry of the batch."""
    features, bases = inputs.features[:1], inputs.bases[:1]
    payload = None if inputs.payload is None else inputs.payload[:1]
    exact = eager_pass(
        Tokens(features.double(), bases.double(), None if payload is None else payload.double())
    )
    same = eager_pass(Tokens(features, bases, payload))
    largest_logit = float(features.double().norm(dim=-1).max()) / TEMPERATURE
    return parity(exact, same, ROUNDING_ATOL, largest_logit)


def present(results: Iterable[torch.Tensor | None]) -> Outputs:
    """The results that there are: without a payload it has none."""
    return tuple(part for part in results if part is not None)


def start_flash_kmeans(inputs: Tokens) -> Call:
    """One iteration of hard clustering by flash-kmeans (PyPI): assignment and update."""
    features, bases = inputs.features, inputs.bases
    if importlib.util.find_spec("flash_kmeans") is None:
        raise UnavailableError("flash-kmeans is not installed: pip install flash-kmeans")
    if not features.is_cuda:
        raise UnavailableError("flash-kmeans needs a CUDA GPU")
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton
    from flash_kmeans.centroid_update_triton import triton_centroid_update_sorted_euclid

    squares = features.square().sum(-1)
    centroids = bases.to(features.dtype)

    def step() -> Outputs:
        labels = euclid_assign_triton(features, centroids, squares, use_heuristic=True)
        return triton_centroid_update_sorted_euclid(features, labels, centroids), labels

    return step


def flash_kmeans_error(inputs: Tokens, answer: Outputs) -> float:
    """How much farther than the nearest centroid a chosen one is; ties may go either way."""
    features, bases = inputs.features, inputs.bases
    tokens, centroids = features[0].double(), bases[0].to(features.dtype).double()
    distances = torch.cdist(tokens, centroids)
    chosen = distances.gather(1, answer[1][0].long().unsqueeze(1)).squeeze(1)
    excess = (chosen - distances.amin(1)) / distances.amin(1).clamp(min=1e-6)
    return float(excess.max()) / ROUNDING_ATOL[features.dtype] / 10


def soft_em_case(
    shape: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    rivals: tuple[str, ...] = (),
    payload: bool = False,
) -> Case[Tokens]:
    """R iterations over features [B, n, D].

    Args:
        shape: Sizes B, n and D.
        device: Device of the inputs.
        dtype: Type of the features.
        rivals: Names of the contenders beside the backends.
        payload: Whether there is one, as a layer's values beside its keys; the rivals leave it.
    """
    batch, tokens, width = shape

    def check(inputs: Tokens) -> Check:
        features = inputs.features
        wanted = objective(features, eager_soft_em(features[:1].float(), inputs.bases[:1].float()))
        return lambda answer: abs(objective(features, answer[0]) / wanted - 1) / OBJECTIVE_TOLERANCE

    def run(inputs: Tokens, backend: str) -> Outputs:
        features, bases, ridden = inputs
        found = soft_em(
            features, bases, num_iters=NUM_ITERS, payload=ridden, empty="zero", backend=backend
        )
        return present(found[:2])

    def start_compiled(inputs: Tokens) -> Call:
        features, bases = inputs.features, inputs.bases.to(dtype)
        step = torch.compile(eager_soft_em, dynamic=False)
        return lambda: (step(features, bases),)

    known: dict[str, Contender[Tokens]] = {
        EAGER: ready(lambda inputs: (eager_soft_em(inputs.features, inputs.bases.to(dtype)),)),
        LEAN_EAGER: ready(lambda inputs: (lean_eager_soft_em(inputs.features, inputs.bases),)),
        COMPILED: Contender(start_compiled),
    }
    without = ", without payload" if payload else ""
    pairs = batch * tokens * NUM_BASES
    read = batch * tokens * width * dtype.itemsize
    products, reads = (4.0 * NUM_ITERS + 2, NUM_ITERS + 1) if payload else (4.0 * NUM_ITERS, 1)
    return Case(
        f"soft_em d={width}" + (" with payload" if payload else ""),
        f"B={batch} n={tokens} D={width} K={NUM_BASES} R={NUM_ITERS}",
        dtype,
        lambda: token_inputs(shape, NUM_BASES, device, dtype, payload=payload),
        {**ours(run), **{name + without: known[name] for name in rivals}},
        check,
        Work(products * pairs * width, NUM_ITERS * pairs, reads * read),
    )


def lean_eager_soft_em(features: torch.Tensor, bases: torch.Tensor) -> torch.Tensor:
    """`eager_soft_em`, but that it divides after the product and so holds one tensor less."""
    for _ in range(NUM_ITERS):
        sums, mass, _ = eager_em_statistics(features, bases)
        bases = sums / (mass + 1e-4).unsqueeze(-1)
    return bases


def objective(features: torch.Tensor, bases: torch.Tensor) -> float:
    """Mean over some tokens of logsumexp_k S, which two good runs agree on: EM is chaotic."""
    some = features[0, :: max(1, features.shape[1] // 4096)].double()
    directions = bases[0].double() / (bases[0].double().norm(dim=-1, keepdim=True) + 1e-4)
    return float(torch.logsumexp(some @ directions.mT / TEMPERATURE, -1).mean())

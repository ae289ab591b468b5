"""The operators against eager torch, torch.compile, every SDPA backend and flash-kmeans."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from stem_kernels import basis_attention, em_statistics, initial_bases, soft_em
from stem_kernels.backends import BACKENDS
from stem_kernels.ops.basis_attention import ROUNDING_ATOL as ATTENTION_ATOL
from stem_kernels.ops.em_statistics import ROUNDING_ATOL as EM_ATOL
from stem_kernels.testing import (
    clustered_tokens,
    eager_basis_attention,
    eager_em_statistics,
    eager_soft_em,
    max_error,
    parity_bound,
)

from .cases import Case, Contender, Outputs, UnavailableError
from .floors import Work

NUM_BASES = 256
NUM_ITERS = 5
TEMPERATURE = 0.01
OBJECTIVE_TOLERANCE = 1e-3
EAGER, COMPILED, FLASH_KMEANS = "eager", "eager, torch.compile", "flash-kmeans"
SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
"""The names of contenders."""
LARGEST_KEY = 160  # the widest head of SD 1.x
SMALL_TOKENS = 1024  # below it a call is shorter than its launches


def cases(device: torch.device, dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    """Every operator at the shapes of SD 1.5's layers, N = 32 frames; `small`: of toys."""
    heads, tokens = (2, 512) if small else (8, 131072)
    for width in (40,) if small else (40, 64, 80, 160):
        yield em_case((heads, tokens, width), device, dtype, compiled=width == 40)
    for width, share in ((320, 1),) if small else ((320, 1), (640, 4), (1280, 16)):
        yield em_case((1, tokens // share, width), device, dtype, compiled=width == 320)
    yield soft_em_case((heads, tokens, 40), device, dtype)
    for width in (40,) if small else (40, 64, 80, 160):
        yield attention_case(heads, tokens, width, device, dtype)


def ours(call: Callable[[str], Outputs]) -> dict[str, Contender]:
    """One contender per backend; `call` takes its name."""
    return {
        name: Contender(lambda name=name: lambda: call(name))  # type: ignore[misc]
        for name in BACKENDS
    }


def parity(
    exact: Outputs, plain: Outputs, rounding: dict[torch.dtype, float], largest_logit: float = 0.0
) -> Callable[[Outputs], float]:
    """A check against float64, on the first entries of the leading axis that `exact` has."""
    bounds = [
        parity_bound(right, same, rounding, largest_logit)
        for right, same in zip(exact, plain, strict=True)
    ]

    def check(answer: Outputs) -> float:
        return max(
            max_error(part[: right.shape[0]], right) / bound
            for part, right, bound in zip(answer, exact, bounds, strict=True)
        )

    return check


def em_case(
    shape: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_bases: int = NUM_BASES,
    compiled: bool = False,
) -> Case:
    """One ST-E + ST-M pass over features [B, n, D]; the key form up to D = 160."""
    batch, tokens, width = shape
    features = clustered_tokens(shape).to(device, dtype)
    bases = initial_bases(features, num_bases)
    first = features[:1], bases[:1]
    check = parity(
        eager_em_statistics(first[0].double(), first[1].double())[:2],
        eager_em_statistics(*first)[:2],
        EM_ATOL,
        float(features[:1].double().norm(dim=-1).max()) / TEMPERATURE,
    )

    def start_compiled() -> Callable[[], Outputs]:
        run = torch.compile(eager_em_statistics, dynamic=False)
        return lambda: run(features, bases)[:2]

    contenders = ours(lambda backend: em_statistics(features, bases, backend=backend)[:2])
    contenders[EAGER] = Contender(lambda: lambda: eager_em_statistics(features, bases)[:2])
    if compiled:
        contenders[COMPILED] = Contender(start_compiled)
    if width <= LARGEST_KEY:
        contenders[FLASH_KMEANS] = flash_kmeans(features, bases)
    pairs = batch * tokens * num_bases
    return Case(
        f"em {'key' if width <= LARGEST_KEY else 'feature'} d={width}",
        f"B={batch} n={tokens} D={width} K={num_bases}",
        contenders,
        check,
        Work(4.0 * pairs * width, pairs, features.numel() * features.element_size()),
        graph=tokens <= SMALL_TOKENS,
    )


def flash_kmeans(features: torch.Tensor, bases: torch.Tensor) -> Contender:
    """One iteration of hard clustering by flash-kmeans (PyPI): assignment and update."""

    def start() -> Callable[[], Outputs]:
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

    def check(answer: Outputs) -> float:
        tokens, centroids = features[0].double(), bases[0].to(features.dtype).double()
        distances = torch.cdist(tokens, centroids)
        chosen = distances.gather(1, answer[1][0].long().unsqueeze(1)).squeeze(1)
        # Ties within rounding may go either way.
        excess = (chosen - distances.amin(1)) / distances.amin(1).clamp(min=1e-6)
        return float(excess.max()) / EM_ATOL[features.dtype] / 10

    return Contender(start, check)


def soft_em_case(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> Case:
    """R iterations over keys [B, n, D] with the values as payload."""
    batch, tokens, width = shape
    features = clustered_tokens(shape).to(device, dtype)
    payload = clustered_tokens(shape, seed=1).to(device, dtype)
    bases = initial_bases(features, NUM_BASES)

    def objective(found: torch.Tensor) -> float:
        """Mean over tokens of logsumexp_k S, which two good runs agree on."""
        some = features[0, :: max(1, tokens // 4096)].double()
        directions = found[0].double() / (found[0].double().norm(dim=-1, keepdim=True) + 1e-4)
        return float(torch.logsumexp(some @ directions.mT / TEMPERATURE, -1).mean())

    wanted = objective(eager_soft_em(features[:1].float(), bases[:1].float()))

    def check(answer: Outputs) -> float:
        return abs(objective(answer[0]) / wanted - 1) / OBJECTIVE_TOLERANCE

    def run(backend: str) -> Outputs:
        found = soft_em(features, bases, payload=payload, empty="zero", backend=backend)
        assert found.payload is not None
        return found.bases, found.payload

    def compiled() -> Callable[[], Outputs]:
        step = torch.compile(eager_soft_em, dynamic=False)
        return lambda: (step(features, bases.to(dtype)),)

    contenders = ours(run)
    contenders["eager, without payload"] = Contender(
        lambda: lambda: (eager_soft_em(features, bases.to(dtype)),)
    )
    contenders[COMPILED] = Contender(compiled)
    pairs = batch * tokens * NUM_BASES
    read = features.numel() * features.element_size()
    return Case(
        f"soft_em key d={width}",
        f"B={batch} n={tokens} D=E={width} K={NUM_BASES} R={NUM_ITERS}",
        contenders,
        check,
        Work((4.0 * NUM_ITERS + 2) * pairs * width, NUM_ITERS * pairs, (NUM_ITERS + 1) * read),
    )


def attention_case(
    heads: int,
    tokens: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_bases: int = NUM_BASES,
) -> Case:
    """Queries as a projection leaves them, views [1, h, n, d] of [1, n, h, d], to the bases."""
    query = clustered_tokens((1, tokens, heads, width)).to(device, dtype).transpose(1, 2)
    key, value = (
        clustered_tokens((1, heads, num_bases, width), seed=seed).to(device, dtype)
        for seed in (1, 2)
    )
    some = query[:, :, :4096]
    right = parity(
        (eager_basis_attention(some.double(), key.double(), value.double()),),
        (eager_basis_attention(some, key, value),),
        ATTENTION_ATOL,
    )

    def check(answer: Outputs) -> float:
        return right((answer[0][:, :, : some.shape[2]],))

    contenders = ours(lambda backend: (basis_attention(query, key, value, backend=backend),))
    for name, backend in SDPA.items():
        contenders[name] = Contender(lambda backend=backend: sdpa(backend))  # type: ignore[misc]

    def sdpa(backend: SDPBackend) -> Callable[[], Outputs]:
        def run() -> Outputs:
            with sdpa_kernel(backend):
                return (scaled_dot_product_attention(query, key, value),)

        try:
            run()
        except RuntimeError as problem:
            if isinstance(problem, torch.OutOfMemoryError):
                raise
            raise UnavailableError(f"SDPA: {problem}") from problem
        return run

    pairs = heads * tokens * num_bases
    return Case(
        f"basis attention d={width}",
        f"q {tokens} h={heads} d={width} K={num_bases}",
        contenders,
        check,
        Work(4.0 * pairs * width, pairs, 2 * query.numel() * query.element_size()),
    )

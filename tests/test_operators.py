"""What the operators promise beyond their formulas."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, INTERPRETED

import stem_kernels
from stem_kernels import (
    attention_bias,
    basis_attention,
    em_statistics,
    em_update,
    initial_bases,
    soft_em,
    standard_normals,
    stem_attention,
)
from stem_kernels.ops.em_update import candidate_tokens
from stem_kernels.ops.soft_em import SoftEM
from stem_kernels.reference import chunks
from stem_kernels.shared.spread import spread_tokens
from stem_kernels.testing import clustered_tokens, eager_soft_em, max_error


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return clustered_tokens(shape, seed=seed).to(DEVICE)


@pytest.mark.interpreter
def test_sums_add_over_chunks_of_tokens(backend: str) -> None:
    features, payload = tokens(2, 300, 12), tokens(2, 300, 5, seed=1)
    bases = tokens(2, 17, 12, seed=2)
    whole = em_statistics(features, bases, payload=payload, backend=backend)
    parts = [
        em_statistics(
            features[:, start : start + 77],
            bases,
            payload=payload[:, start : start + 77],
            backend=backend,
        )
        for start in range(0, 300, 77)
    ]
    for index, result in enumerate(whole):
        total = sum(part[index].double() for part in parts)
        assert max_error(result, total) <= 1e-5 * float(result.abs().max())


@pytest.mark.interpreter
def test_no_tokens_give_zeros(backend: str) -> None:
    found = em_statistics(tokens(2, 0, 12), tokens(2, 3, 12), backend=backend)
    assert found.payload_sums is None
    assert not found.sums.any()
    assert not found.mass.any()
    attended = basis_attention(
        tokens(2, 3, 0, 8), tokens(1, 3, 4, 8), tokens(1, 3, 4, 6), backend=backend
    )
    assert attended.shape == (2, 3, 0, 6)


@pytest.mark.interpreter
def test_output_memory_is_head_interleaved(backend: str) -> None:
    query = tokens(2, 50, 3, 8).transpose(1, 2)
    out = basis_attention(query, tokens(1, 3, 4, 8), tokens(1, 3, 4, 6), backend=backend)
    assert out.shape == (2, 3, 50, 6)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.interpreter
def test_excluded_bases_have_no_influence(backend: str) -> None:
    query, key, value = tokens(1, 2, 40, 8), tokens(1, 2, 200, 8, seed=1), tokens(1, 2, 200, 8)
    bias = torch.zeros(2, 200, device=DEVICE)
    bias[:, :150] = float("-inf")  # more than one tile of the kernel is excluded whole
    out = basis_attention(query, key, value, bias=bias, backend=backend)
    only = basis_attention(query, key[:, :, 150:], value[:, :, 150:], backend=backend)
    assert max_error(out, only) < 1e-6
    nothing = torch.full((2, 200), float("-inf"), device=DEVICE)
    assert basis_attention(query, key, value, bias=nothing, backend=backend).isnan().all()


def test_iterations_follow_the_formula() -> None:
    features, bases = tokens(2, 500, 16), tokens(2, 9, 16, seed=1)
    found = soft_em(features, bases, num_iters=4, temperature=1.0, empty="zero")
    expected = eager_soft_em(features.double(), bases.double(), num_iters=4, temperature=1.0)
    assert max_error(found.bases, expected) < 1e-5


def step_by_step(
    features: torch.Tensor,
    bases: torch.Tensor,
    payload: torch.Tensor,
    empty: str,
    size: int,
    backend: str,
) -> SoftEM:
    """`soft_em` of three iterations at temperature 0.5, over chunks of `size` tokens."""
    n = features.shape[-2]
    index = candidate_tokens(n, bases.shape[-2], features.device)
    pieces = list(zip(features.split(size, -2), payload.split(size, -2), strict=True))
    for policy in (empty, empty, "mask" if empty == "reseed" else empty):
        parts = [
            em_statistics(chunk, bases, temperature=0.5, payload=values, backend=backend)
            for chunk, values in pieces
        ]
        sums, mass, payload_sums = (sum(part) for part in zip(*parts, strict=True))
        found = em_update(
            sums,
            mass,
            bases,
            num_tokens=n,
            empty=policy,
            payload_sums=payload_sums,
            candidates=features[..., index, :],
            backend=backend,
        )
        bases = found.bases
    return found


@pytest.mark.parametrize("empty", ["zero", "mask", "reseed"])
@pytest.mark.interpreter
def test_statistics_and_updates_make_soft_em(backend: str, empty: str) -> None:
    features, payload = 1 + tokens(1, 2, 120, 12), tokens(1, 2, 120, 5, seed=1)
    bases = features[..., ::10, :].clone()
    bases[..., :4, :] = -1.0  # away from all tokens
    options = {"num_iters": 3, "temperature": 0.5, "empty": empty, "backend": backend}
    fused = soft_em(features, bases, payload=payload, **options)  # type: ignore[arg-type]
    assert bool((fused.mass == 0).any()) == (empty == "mask")
    whole = step_by_step(features, bases, payload, empty, 120, backend)
    parts = step_by_step(features, bases, payload, empty, 77, backend)
    for one, other, chunked in zip(fused, whole, parts, strict=True):
        if backend == "torch":
            assert torch.equal(one, other)
        tolerance = 1e-4 * float(one.abs().max())
        assert max_error(other, one) <= tolerance
        assert max_error(chunked, one) <= tolerance


@pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu", reason="Triton alone has a kernel of its own for it"
)
@pytest.mark.interpreter
def test_an_update_has_the_same_bits_in_triton() -> None:
    sums, bases, payload = (tokens(2, 37, width, seed=width) for width in (40, 40, 5))
    mass = 40 * tokens(2, 37, seed=1).abs()
    mass[:, ::5] = 1e-3  # of an empty base
    for empty in ("zero", "mask"):
        found, expected = (
            em_update(
                sums.mT.contiguous().mT, mass, bases.half(),
                num_tokens=99, empty=empty, payload_sums=payload, backend=backend,
            )
            for backend in ("triton", "torch")
        )  # fmt: skip
        assert all(map(torch.equal, found, expected))
    operator = torch.ops.stem_kernels.em_update_triton
    for values in (payload, None):
        sample = (sums, mass, bases, values, 99, True)
        torch.library.opcheck(operator, sample, test_utils=["test_schema", "test_faketensor"])


def test_the_objective_does_not_fall_on_average() -> None:
    features = tokens(1, 2000, 16)
    features = features / features.norm(dim=-1, keepdim=True)
    bases = initial_bases(features, 32)

    def objective(num_iters: int) -> float:
        found = soft_em(features, bases, num_iters=num_iters, temperature=0.05).bases
        directions = found / (found.norm(dim=-1, keepdim=True) + 1e-4)
        return float(torch.logsumexp(features @ directions.mT / 0.05, -1).mean())

    assert objective(8) > objective(1) + 0.1


def with_an_empty_base() -> tuple[torch.Tensor, torch.Tensor]:
    features = torch.eye(2, 8, device=DEVICE).repeat(50, 1).unsqueeze(0)
    bases = torch.eye(3, 8, device=DEVICE).unsqueeze(0)
    bases[0, 2] = -1.0
    return features, bases


@pytest.mark.parametrize("empty", ["zero", "mask", "reseed"])
def test_empty_bases(empty: str) -> None:
    features, bases = with_an_empty_base()
    features[0, 0, 5] = 3.0  # a token that neither of the two bases explains
    found = soft_em(features, bases, num_iters=3, payload=features, empty=empty)
    if empty == "zero":
        assert found.bases[0, 2].abs().max() < 1e-6
        assert attention_bias(found.mass, empty=empty) is None
    elif empty == "mask":
        assert torch.equal(found.bases[0, 2], bases[0, 2])
        assert found.mass[0, 2] == 0
        bias = attention_bias(found.mass, empty=empty)
        assert bias is not None
        assert bias.tolist() == [[0.0, 0.0, float("-inf")]]
    else:
        assert found.mass[0, 2] == pytest.approx(1.0, abs=1e-3)
        assert max_error(found.bases[0, 2], features[0, 0]) < 1e-3
        assert (found.mass > 0).all()
    assert float(found.mass.sum()) == pytest.approx(100, rel=1e-4)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("empty", ["mask", "reseed"])
@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
def test_fewer_tokens_than_bases_leave_one_to_attend_to(
    n: int, empty: str, temperature: float
) -> None:
    features = tokens(1, 2, n, 8)
    start = initial_bases(features, 256, init="tokens")
    found = soft_em(features, start, payload=features, empty=empty, temperature=temperature)
    assert (found.mass > 0).any(-1).all()
    out = basis_attention(
        features,
        found.bases,
        found.payload,
        bias=attention_bias(found.mass, empty=empty, proportional=True),
    )
    assert out.isfinite().all()


def test_attention_bias_weighs_by_mass() -> None:
    mass = torch.tensor([[0.0, 1.0, 5000.0]])
    bias = attention_bias(mass, proportional=True)
    assert bias is not None
    assert torch.equal(bias, torch.log(mass))


def test_initial_bases() -> None:
    features = tokens(2, 30, 4)
    spread = initial_bases(features, 10, init="tokens")
    index = spread_tokens(30, 10, torch.device(DEVICE))
    assert torch.equal(spread, features[:, index])
    repeated = initial_bases(features[:, :2], 4, init="tokens")
    assert torch.equal(repeated, features[:, [0, 0, 1, 1]])
    normals = torch.randn(10, 4, device=DEVICE)
    gaussian = initial_bases(features, 10, init="gaussian", normals=normals)
    expected = features.mean(1, keepdim=True) + features.std(1, keepdim=True) * normals
    assert max_error(gaussian, expected) < 1e-6
    assert initial_bases(features[:, :1], 10, init="gaussian", normals=normals).isfinite().all()
    with pytest.raises(ValueError, match='init="gaussian" needs the argument normals'):
        initial_bases(features, 10, init="gaussian")
    with pytest.raises(ValueError, match=r"normals is \[9, 4\]; it must broadcast to \[2, 10, 4\]"):
        initial_bases(features, 10, init="gaussian", normals=normals[:9])


@pytest.mark.parametrize(("n", "count"), [(7, 7), (100, 99), (4096 * 32, 256), (2**23 + 5, 8192)])
def test_spread_tokens_come_from_everywhere(n: int, count: int) -> None:
    index = spread_tokens(n, count, torch.device("cpu"))
    edges = [k * n // count for k in range(count + 1)]
    stretches = zip(edges[:-1], index.tolist(), edges[1:], strict=True)
    assert all(start <= chosen < end for start, chosen, end in stretches)


def test_spread_tokens_are_not_of_one_column() -> None:
    columns = spread_tokens(32 * 64 * 64, 256, torch.device("cpu")) % 64
    assert torch.bincount(columns, minlength=64).min() >= 1


def test_normals_depend_on_seed_layer_and_timestep_alone() -> None:
    at = torch.tensor
    before = torch.random.get_rng_state()
    both = standard_normals(at(21), [6, 8], seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(both[:6], standard_normals(at(21), [6, 3], seed=3)[:6])
    assert not torch.equal(both[:6], both[6:12])
    assert torch.equal(both, standard_normals(at([21.0, 21.0]), [6, 8], seed=3))
    for other in (
        standard_normals(at(1), [6, 8], seed=3),
        standard_normals(at(21), [6, 8], seed=4),
    ):
        assert not torch.equal(both, other)
    many = standard_normals(at(1), [100_000], seed=0)
    assert abs(float(many.mean())) < 0.02
    assert abs(float(many.std()) - 1) < 0.02


def test_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CPU_LOGITS_PER_HEAD", 16 * 5)  # 20 tokens are two chunks

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    torch.manual_seed(0)
    features, bases, payload = leaf(1, 2, 20, 4), leaf(1, 2, 5, 4), leaf(1, 2, 20, 3)
    assert torch.autograd.gradcheck(
        lambda x, m, p: tuple(em_statistics(x, m, payload=p, temperature=0.5)),
        (features, bases, payload),
    )
    assert torch.autograd.gradcheck(
        lambda x, m: tuple(em_statistics(x, m, temperature=0.5)[:2]), (features, bases)
    )
    sums, mass, empty = leaf(2, 5, 4), leaf(2, 5).detach().abs(), torch.zeros(2, 1).double()
    mass = torch.cat([mass[:, :-1] + 1, empty], -1).requires_grad_()
    seeds, settings = leaf(2, 9, 4), {"num_tokens": 20, "empty": "reseed"}
    assert torch.autograd.gradcheck(
        lambda s, w, m, c: tuple(em_update(s, w, m, candidates=c, payload_sums=s, **settings)),
        (sums, mass, leaf(2, 5, 4), seeds),
    )
    query, key, value, bias = leaf(2, 1, 20, 4), leaf(1, 1, 5, 4), leaf(1, 1, 5, 6), leaf(1, 5)
    assert torch.autograd.gradcheck(
        lambda q, k, v, b: basis_attention(q, k, v, bias=b), (query, key, value, bias)
    )
    assert torch.autograd.gradcheck(lambda q, k, v: basis_attention(q, k, v), (query, key, value))


@pytest.mark.parametrize("op", ["em_statistics", "soft_em", "basis_attention"])
@pytest.mark.interpreter
def test_opcheck(backend: str, op: str) -> None:
    grad = backend == "torch"
    if grad and op == "soft_em":
        pytest.skip("in torch soft_em is made of em_statistics, and is no operator of its own")
    if backend == "cuda":
        _check_extension(op)
        return
    operator = _registered(op, backend)
    if op == "em_statistics":
        features = tokens(2, 30, 3, 8).transpose(1, 2).requires_grad_(grad)
        bases, payload = tokens(2, 3, 5, 8), tokens(2, 3, 30, 4)
        samples = [(features, bases, payload, 0.5, True), (features, bases, None, 0.5, False)]
    elif op == "soft_em":
        features, bases, payload = tokens(2, 3, 30, 8), tokens(2, 3, 5, 8), tokens(2, 3, 30, 4)
        samples = [
            (features, bases, payload, 5, 2, 0.5, True, "mask", "log"),
            (features[0], None, None, 5, 2, 0.5, False, "reseed", "none"),
        ]
    else:
        query = tokens(2, 30, 3, 8).transpose(1, 2).requires_grad_(grad)
        key, bias = tokens(1, 3, 5, 8), torch.zeros(1, 3, 5, device=DEVICE)
        samples = [(query, key, key, bias, 0.3), (query, key, key, None, 0.3)]
        if backend == "triton":
            corrected = tokens(2, 3, 9, 8), tokens(2, 3, 8)
            samples = [
                (query, key, key, bias, *corrected, 0.3),
                (query, key, key, None, None, None, 0.3),
            ]
    for sample in samples:
        tests = ["test_schema", "test_faketensor"]
        if grad:
            tests += ["test_autograd_registration", "test_aot_dispatch_static"]
        torch.library.opcheck(operator, sample, test_utils=tests)


def _registered(op: str, backend: str):  # type: ignore[no-untyped-def]
    if backend == "triton":
        import stem_kernels.triton.basis_attention
        import stem_kernels.triton.em_statistics
        import stem_kernels.triton.soft_em
    if backend == "torch":
        import stem_kernels.reference.basis_attention
        import stem_kernels.reference.em_statistics  # noqa: F401
    return getattr(torch.ops.stem_kernels, f"{op}_{backend}")


def _check_extension(op: str) -> None:
    """The same for the C++ extension, whose arguments are what is left after its wrappers."""
    from stem_kernels.cuda import basis_attention, em_statistics, soft_em  # noqa: F401

    features, bases = tokens(2, 30, 3, 8).transpose(1, 2), tokens(2, 3, 5, 8)
    if op == "basis_attention":
        key = tokens(1, 3, 5, 8).expand(2, -1, -1, -1)
        bias = torch.zeros(3, 5, device=DEVICE).expand(2, -1, -1)
        corrected = tokens(2, 3, 9, 8).float(), tokens(2, 3, 8).float()
        samples = [
            (features, key, key, bias, *corrected, 0.3),
            (features, key, key, None, None, None, 0.3),
        ]
    else:
        iterations, policy = ([2], [True, 0.01]) if op == "soft_em" else ([], [])
        samples = [
            (features, bases, payload, *iterations, 0.5, True, *policy)
            for payload in (None, tokens(2, 3, 30, 4))
        ]
    for sample in samples:
        operator = getattr(torch.ops.stem_kernels_ext, op)
        torch.library.opcheck(operator, sample, test_utils=["test_schema", "test_faketensor"])


def test_compiles_to_one_graph(backend: str) -> None:
    query, key, value = (tokens(1, 2, 70, 16, seed=seed) for seed in (0, 1, 2))

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return stem_attention(
            q, k, v, num_bases=8, init="gaussian", empty="reseed", backend=backend
        )

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert max_error(compiled(query, key, value), attention(query, key, value)) < 1e-5
    few = [tensor[:, :, :20] for tensor in (query, key, value)]  # exact
    assert max_error(compiled(*few), attention(*few)) < 1e-5


@pytest.mark.parametrize("op", ["em_statistics", "soft_em", "basis_attention", "stem_attention"])
def test_peak_memory_does_not_hold_the_responsibilities(backend: str, op: str) -> None:
    from stem_kernels.measure import PeakMemory

    features = tokens(1, 4, 32768, 40)
    bases = initial_bases(features, 256)

    def run() -> None:
        if op == "em_statistics":
            em_statistics(features, bases, payload=features, backend=backend)
        elif op == "soft_em":
            options = {"num_iters": 2, "empty": "reseed", "backend": backend}
            soft_em(features, bases, payload=features, **options)  # type: ignore[arg-type]
        elif op == "basis_attention":
            basis_attention(features, bases, bases, backend=backend)
        else:
            stem_attention(features, features, features, num_iters=2, backend=backend)

    run()
    with PeakMemory(DEVICE) as memory:
        run()
    read = features.numel() * 4
    written = read if op.endswith("attention") else 0
    assert memory.extra_bytes is not None
    assert memory.extra_bytes <= written + 0.02 * read + 2**25  # responsibilities have 2**27


X = torch.zeros(2, 10, 4)
M = torch.zeros(2, 3, 4)
Q = torch.zeros(2, 3, 10, 4)
KV = torch.zeros(1, 3, 5, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: em_statistics(X[0], M), ValueError, r"features must be \[B, n, D\].*\[10, 4\]"),
        (
            lambda: em_statistics(X, M[:1]),
            ValueError,
            r"bases must be \[2, K, 4\], not \[1, 3, 4\]",
        ),
        (lambda: em_statistics(X, M[:, :0]), ValueError, "K and D must be at least 1"),
        (lambda: em_statistics(X, M, payload=X[:, :9]), ValueError, r"payload is \[2, 9, 4\]"),
        (lambda: em_statistics(X, M, payload=X.half()), TypeError, "must have one dtype"),
        (lambda: em_statistics(X.int(), M), TypeError, "features is torch.int32; convert it"),
        (lambda: em_statistics([1.0], M), TypeError, "features must be a torch.Tensor, not list"),
        (lambda: em_statistics(X, M, temperature=0), ValueError, "temperature is 0; it must be"),
        (lambda: em_statistics(X, M.to("meta")), ValueError, "must be on one device"),
        (
            lambda: soft_em(X, M, num_iters=0),
            ValueError,
            "num_iters is 0; it must be a whole number",
        ),
        (lambda: soft_em(X, M, empty="drop"), ValueError, 'empty is "drop"; it must be one of'),
        (lambda: soft_em(X[:, :0], M), ValueError, "there must be a token"),
        (
            lambda: em_update(M, M[..., 0], M[:1], num_tokens=9),
            ValueError,
            r"bases \[..., K, D\]; they are \[2, 3, 4\], \[2, 3\], \[1, 3, 4\]",
        ),
        (
            lambda: em_update(M.half(), M[..., 0].half(), M, num_tokens=9),
            TypeError,
            "sums is torch.float16, which many tokens overflow",
        ),
        (
            lambda: em_update(M, M[..., 0], M, num_tokens=9, payload_sums=M[:, :2]),
            ValueError,
            r"payload_sums is \[2, 2, 4\]",
        ),
        (
            lambda: em_update(M, M[..., 0], M, num_tokens=0),
            ValueError,
            "num_tokens is 0; it must be a whole number of at least 1",
        ),
        (
            lambda: em_update(M, M[..., 0], M, num_tokens=9, empty="reseed"),
            ValueError,
            "needs the argument candidates",
        ),
        (
            lambda: em_update(M, M[..., 0], M, num_tokens=9, empty="reseed", candidates=X[..., :3]),
            ValueError,
            r"candidates must be \[2, m, 4\] with m >= 1, not \[2, 10, 3\]",
        ),
        (lambda: initial_bases(X, 0), ValueError, "num_bases is 0; it must be a whole number"),
        (lambda: initial_bases(X[:, :0], 3), ValueError, "there must be a token"),
        (lambda: basis_attention(X, KV, KV), ValueError, r"query must be \[B, h, n, d\]"),
        (lambda: basis_attention(Q, KV[:, :2], KV), ValueError, r"key must be \[2 or 1, 3, K"),
        (lambda: basis_attention(Q, KV, KV[:, :, :4]), ValueError, "must agree on all but"),
        (lambda: basis_attention(Q, KV.half(), KV), TypeError, "must have one dtype"),
        (
            lambda: basis_attention(Q, KV, KV, bias=torch.zeros(3, 4)),
            ValueError,
            r"bias is \[3, 4\]; it must be \[h, K\] or \[B, h, K\] with B = 2 or 1",
        ),
        (
            lambda: initial_bases(X, 3, init="previous"),
            ValueError,
            'init is "previous"; it must be one of "gaussian", "tokens"',
        ),
    ],
)
def test_errors_name_the_value_and_the_fix(call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()


def test_the_public_names() -> None:
    assert len(stem_kernels.__all__) <= 12
    for name in stem_kernels.__all__:
        assert getattr(stem_kernels, name).__doc__

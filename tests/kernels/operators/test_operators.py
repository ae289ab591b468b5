"""What the operators promise beyond their formulas."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, tokens

from stem_kernels import (
    attention_bias,
    basis_attention,
    em_statistics,
    em_update,
    initial_bases,
    soft_em,
    stem_attention,
)
from stem_kernels.reference import chunks
from stem_kernels.testing import max_error


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


def test_attention_bias_weighs_by_mass() -> None:
    mass = torch.tensor([[0.0, 1.0, 5000.0]])
    bias = attention_bias(mass, proportional=True)
    assert bias is not None
    assert torch.equal(bias, torch.log(mass))


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


def test_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CPU_LOGITS_PER_HEAD", 16 * 3)  # 18 tokens are two chunks

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    torch.manual_seed(0)
    features, bases, payload = leaf(1, 1, 18, 3), leaf(1, 1, 3, 3), leaf(1, 1, 18, 2)
    assert torch.autograd.gradgradcheck(
        lambda x, m, p: tuple(em_statistics(x, m, payload=p, temperature=0.5)),
        (features, bases, payload),
    )
    # A tensor that is given twice, and one that needs no gradient.
    assert torch.autograd.gradgradcheck(
        lambda x: tuple(em_statistics(x, bases.detach(), payload=x)), (features,)
    )
    query, key, value, bias = leaf(2, 1, 18, 3), leaf(1, 1, 3, 3), leaf(1, 1, 3, 2), leaf(1, 3)
    assert torch.autograd.gradgradcheck(
        lambda q, k, v, b: basis_attention(q, k, v, bias=b), (query, key, value, bias)
    )
    assert torch.autograd.gradgradcheck(lambda q, k: basis_attention(q, k, k), (query, key))
    nothing = leaf(1, 1, 0, 3)
    for out in (em_statistics(nothing, bases).sums, basis_attention(nothing, bases, bases)):
        found = torch.autograd.grad(out.sum(), (nothing, bases), create_graph=True)
        assert [int(each.count_nonzero()) for each in found] == [0, 0]


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
            tests += ["test_autograd_registration"]
        if grad and sample is samples[0]:
            tests += ["test_aot_dispatch_static"]
        torch.library.opcheck(operator, sample, test_utils=tests)


def _registered(op: str, backend: str):  # type: ignore[no-untyped-def]
    if backend == "triton":
        import stem_kernels.triton.attention.basis
        import stem_kernels.triton.em.soft_em
        import stem_kernels.triton.em.statistics
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


@pytest.mark.usefixtures("mapped_blocks")
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

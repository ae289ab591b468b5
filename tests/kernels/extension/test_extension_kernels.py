"""What the compiled extension computes: instructions, threads, rounding, checks; and where."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stem_kernels import basis_attention, cuda, em_statistics, soft_em
from stem_kernels.ops.partial_attention import partial_attention
from stem_kernels.shared.memory import lacks_memory
from stem_kernels.testing import clustered_tokens

ROOT = Path(__file__).parents[3]

built = pytest.mark.skipif(
    cuda.load_error("cpu") is not None, reason=f"no extension: {cuda.load_error('cpu')}"
)


def test_a_gpu_that_the_object_has_no_image_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "load_error", lambda part: None)
    device = torch.device("cuda", 0)

    def reasons(built: str, capability: tuple[int, int]) -> list[str]:
        monkeypatch.setattr(cuda, "_images", tuple(map(cuda.Image.of, built.split())))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        return cuda.device_reasons(device)

    for built, capability in (
        ("9.0", (9, 0)),
        ("8.0", (8, 9)),
        ("8.0 8.6+PTX", (12, 0)),
        ("10.0", (10, 3)),
        ("", (9, 0)),
    ):
        assert reasons(built, capability) == []
    for built, capability in (("9.0", (8, 0)), ("9.0", (12, 0)), ("8.6 9.0+PTX", (8, 0))):
        (reason,) = reasons(built, capability)
        have = ".".join(map(str, capability))
        names = built.replace(" ", ", ")
        assert f"cuda:0 has compute capability {have}; its kernels were compiled for {names}; " in (
            reason
        )
        assert reason.endswith(f"with: TORCH_CUDA_ARCH_LIST={have} pip install --no-deps .")


@built
@pytest.mark.long
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_other_instructions(capability: str) -> None:
    if capability == torch.backends.cpu.get_cpu_capability().lower():
        pytest.skip(f"all other tests are with {capability} here")
    chosen = "cuda and (iterations or excluded or repeat or correction or (attention and 255) "
    chosen += "or (partial and 100) or (projected and parity))"
    files = tuple(
        f"tests/kernels/operators/test_{name}.py"
        for name in ("parity", "calibration", "projected_attention")
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", chosen, *files],
        cwd=ROOT,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@built
def test_threads_do_not_change_a_bit() -> None:
    features = clustered_tokens((2, 3000, 40))
    bases, payload = features[:, ::50].clone(), clustered_tokens((2, 3000, 24))
    heads = features.view(2, 1, 3000, 40)
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            found = soft_em(features, bases, payload=payload, backend="cuda")
            attended = partial_attention(heads[:, :, ::50], heads, heads, backend="cuda")
        finally:
            torch.set_num_threads(threads)
        results.append((*found, *attended))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


SHARP, SOFT = 100.0, 0.1
"""Lengths of tokens: at tau = 0.1 one weight is not 0 then, or all of them are."""


@built
@pytest.mark.parametrize(
    "lengths",
    [[SHARP], [SOFT], [SHARP, SOFT], [SOFT, SHARP], [SOFT, SHARP, SOFT, SHARP]],
    ids=lambda lengths: "-".join("sharp" if length == SHARP else "soft" for length in lengths),
)
def test_tiles_of_few_weights_and_of_many(lengths: list[float]) -> None:
    # So many heads that each has one part, and so many tokens that this has two float32 sums.
    heads, tokens, width, count = 33, 15_000, 5, 71
    generator = torch.Generator().manual_seed(0)
    bases = torch.randn(1, heads, count, width, generator=generator)
    near = bases[:, :, torch.randint(count, (tokens,), generator=generator)]
    features = near / near.norm(dim=-1, keepdim=True)
    part = -(-tokens // len(lengths))
    long = torch.tensor(lengths).repeat_interleave(part)[:tokens, None]
    features = features * long
    payload = torch.randn(1, heads, tokens, 3, generator=generator)
    found, exact = (
        em_statistics(
            features.to(dtype), bases.to(dtype), payload=payload.to(dtype), temperature=0.1,
            backend=backend,
        )
        for dtype, backend in ((torch.float32, "cuda"), (torch.float64, "torch"))
    )  # fmt: skip
    for one, other in zip(found, exact, strict=True):
        largest = float(other.abs().max())
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5 * largest)


@built
def test_a_token_that_is_no_number_reaches_every_base() -> None:
    features = SHARP * clustered_tokens((1, 300, 40))
    features[0, 7] = torch.nan
    for part in em_statistics(features, features[:, ::9], backend="cuda")[:2]:
        assert part.isnan().all()


@built
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_read_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    one = torch.zeros(1, 1, 1, 1, dtype=dtype)
    value = every.view(1, 1, 1, -1)
    out = basis_attention(one, one, value, backend="cuda")[0, 0, 0]
    assert torch.equal(out.isnan(), every.isnan())
    numbers = ~every.isnan()
    assert torch.equal(out[numbers], every[numbers])
    # The mean of two neighbours that are not 0 or 1 apart has to be rounded.
    pair = torch.stack([every, every.roll(3)]).view(1, 1, 2, -1)
    key = torch.zeros(1, 1, 2, 1, dtype=dtype)
    out = basis_attention(one, key, pair, backend="cuda")[0, 0, 0]
    expected = ((every.float() + every.roll(3).float()) / 2).to(dtype)
    numbers = ~expected.isnan()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out[numbers], expected[numbers])


EXPONENTIALS = """
#include "stem/cpu/exp.h"
using namespace stem::cpu::baseline;
int main() {
  float last = 1.0f;
  const float exponents[] = {0, -50, -99, -130, -300, -1e4f, -3e38f, -__builtin_inff()};
  for (float t : exponents) {
    const float weight = exp2_of_nonpositive(broadcast(t))[0];
    if (!(weight <= last) || (t < -100.0f && weight != 0.0f)) return 2;
    last = weight;
  }
  return 0;
}
"""


def test_exponentials_overflow_no_integer(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not found")
    source, program = tmp_path / "exponentials.cpp", tmp_path / "exponentials"
    source.write_text(EXPONENTIALS)
    flags = ["-std=c++17", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
    flags += ["-DSTEM_ISA=baseline", "-DSTEM_LANES=4", f"-I{ROOT / 'csrc' / 'include'}"]
    subprocess.run(["g++", *flags, source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@built
def test_the_operators_check_what_they_are_given() -> None:
    operators = torch.ops.stem_kernels_ext
    x, m = torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 3, 4)

    def attention(*tensors: torch.Tensor | None) -> torch.Tensor:
        given = [*tensors, *[None] * (6 - len(tensors))]
        found: torch.Tensor = operators.basis_attention(*given, 1.0)
        return found

    for call, message in (
        (lambda: operators.em_statistics(x, m[..., :3], None, 1.0, True), r"must be \[1, 1, any"),
        (lambda: operators.em_statistics(x.double(), m, None, 1.0, True), "must be float32, float"),
        (lambda: operators.em_statistics(x, m.half(), None, 1.0, True), "contiguous and float32"),
        (lambda: operators.em_statistics(x.mT, x.mT, None, 1.0, True), "contiguous in its last"),
        (lambda: operators.em_statistics(x, m, x[:, :, 1:], 1.0, True), r"must be \[1, 1, 5, any"),
        (lambda: attention(x, m, m.half()), "must have one dtype"),
        (lambda: attention(x, m, m, m[0]), r"bias must be \[B, h, K\]"),
        (lambda: attention(x, m, m, None, m), "go together"),
        (lambda: attention(x, m, m, None, m, m[:, :, 0]), r"correction must be \[1, 1, 5, 4\]"),
        (lambda: attention(x, m, m, None, x, m[0]), r"query_mean must be \[1, 1, 4\]"),
        (lambda: operators.partial_attention(x, m, x, 1.0), r"value must be \[1, 1, 3, any\]"),
        (lambda: operators.partial_attention(x, m.half(), m, 1.0), "must have one dtype"),
        (lambda: operators.partial_attention(x, x[:, :, :0], x[:, :, :0], 1.0), "one key"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


@built
@pytest.mark.parametrize("threads", [1, 2])
def test_memory_that_is_lacking_is_said(threads: int) -> None:
    def of_heads(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.expand(-1, 4, -1, -1)

    one, few = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 3, 1)
    many = one.expand(1, 1, 2**46, 1)  # one number; more bytes of them than addresses
    operators = torch.ops.stem_kernels_ext
    for call in (
        lambda: operators.nearest_token(many, few, torch.ones(1, 1, 3)),
        lambda: operators.basis_attention(many, few, few, None, None, None, 1.0),
        # Of four heads, each in a task of its own.
        lambda: operators.basis_attention(
            of_heads(few), of_heads(many), of_heads(many), None, None, None, 1.0
        ),
        lambda: operators.partial_attention(many, few, few, 1.0),
        lambda: operators.window_attention(many, many, many, 2**46, 1, 1, 0, 1.0),
    ):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with pytest.raises(RuntimeError, match=r"out of memory: a t\w+ .*needs \d") as raised:
                call()
        finally:
            torch.set_num_threads(before)
        assert lacks_memory(raised.value)

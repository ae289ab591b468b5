"""What spares memory of a small card: every mechanism works with it, or it is refused by name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from pipelines import ONE_LEVEL, SMALL, call, make_unet, unet_inputs
from video_models import FRAMES, KINDS, call_model, make_model, model_inputs

import stem
from stem import InflatedConfig, PerFrameConfig, SparseCausalConfig, StemConfig
from stem.attention import Hooks, Recording, Replay

pytestmark = pytest.mark.thinned

CPU = torch.device("cpu")
PAGE = Path(__file__).parents[2] / "docs" / "small-cards.md"
MECHANISMS: dict[str, Any] = {
    "STEM": SMALL,
    "STEM, key space": dataclasses.replace(SMALL, space="key"),
    "STEM, bases of a few frames": dataclasses.replace(SMALL, fit_frames=2),
    "sparse-causal": SparseCausalConfig(num_frames=4),
    "inflated": InflatedConfig(num_frames=4),
    "per frame": PerFrameConfig(num_frames=4),
}
SAME, LAST, ROUNDED = "same bits", "same but for last bits", "bits of rounded weights"
NEAR, REFUSED = "near", "refused"
BOUNDS = {SAME: 0.0, LAST: 1e-5, ROUNDED: 0.0, NEAR: 0.05}
"""By outcome: what the output may differ by, relatively, from that of the UNet it is compared with.

It is the UNet of float32 weights; of rounded ones where they are stored so.
"""


@dataclasses.dataclass(frozen=True)
class Way:
    """A way of sparing memory, and what comes of it.

    Args:
        name: Name in the table, as Markdown.
        apply: Function that applies it to a UNet, given an empty folder.
        whole: Outcome where all frames run at once.
        chunks: Outcome in chunks.
        apart: Both outcomes of the mechanisms that have their own, by name.
        stored: Dtype that weights are rounded to, or None.
        note: Reason, for the table.
    """

    name: str
    apply: Callable[[Any, Path], Any]
    whole: str = SAME
    chunks: str = SAME
    apart: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    stored: torch.dtype | None = None
    note: str = ""


def grouped(kind: str, on_disk: bool) -> Callable[[Any, Path], None]:
    def apply(unet: Any, folder: Path) -> None:
        apply_group_offloading(
            unet,
            CPU,
            offload_type=kind,
            num_blocks_per_group=1 if kind == "block_level" else None,
            offload_to_disk_path=str(folder) if on_disk else None,
        )

    return apply


def cast(stored: torch.dtype) -> Callable[[Any, Path], None]:
    return lambda unet, _: unet.enable_layerwise_casting(stored, torch.float32)


def quantised_by_torch(unet: Any, _: Path) -> None:
    kinds = {torch.nn.Linear}
    torch.ao.quantization.quantize_dynamic(unet, kinds, dtype=torch.qint8, inplace=True)


def quantised_by_torchao(config: str) -> Callable[[Any, Path], None]:
    def apply(unet: Any, _: Path) -> None:
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(unet, getattr(quantization, config)())

    return apply


IN_FILES = "small layers of a CPU sum by where weights lie in memory"
AT_ONCE = "a block's weights would be taken away under another chunk"
ALONE = {"STEM, bases of a few frames": (REFUSED, REFUSED), "per frame": (SAME, SAME)}
WAYS = (
    Way(
        "`enable_model_cpu_offload`, `--offload model`",
        lambda unet, _: accelerate.cpu_offload_with_hook(unet, CPU),
    ),
    Way(
        "`enable_sequential_cpu_offload`, `--offload sequential`",
        lambda unet, _: accelerate.cpu_offload(unet, CPU),
    ),
    Way(
        "group offloading, `leaf_level`, `--offload group`",
        grouped("leaf_level", False),
    ),
    Way(
        "the same onto a disk, `--offload-folder`",
        grouped("leaf_level", True),
        whole=LAST,
        chunks=LAST,
        note=IN_FILES,
    ),
    Way(
        "group offloading, `block_level`",
        grouped("block_level", False),
        chunks=REFUSED,
        apart=ALONE,
        note=AT_ONCE,
    ),
    Way(
        "the same onto a disk",
        grouped("block_level", True),
        whole=LAST,
        chunks=REFUSED,
        apart=ALONE | {"per frame": (LAST, LAST)},
        note=f"{AT_ONCE}; {IN_FILES}",
    ),
    Way(
        "`enable_layerwise_casting`, float16",
        cast(torch.float16),
        whole=ROUNDED,
        chunks=ROUNDED,
        stored=torch.float16,
    ),
    Way(
        "`enable_layerwise_casting`, float8_e4m3fn",
        cast(torch.float8_e4m3fn),
        whole=ROUNDED,
        chunks=ROUNDED,
        stored=torch.float8_e4m3fn,
    ),
    Way(
        "`torch.ao.quantization.quantize_dynamic`, int8",
        quantised_by_torch,
        whole=NEAR,
        chunks=NEAR,
        note="scales of activations are each chunk's own",
    ),
    Way(
        "torchao's `Int8WeightOnlyConfig`",
        quantised_by_torchao("Int8WeightOnlyConfig"),
        whole=NEAR,
        chunks=NEAR,
    ),
    Way(
        "torchao's `Int8DynamicActivationInt8WeightConfig`",
        quantised_by_torchao("Int8DynamicActivationInt8WeightConfig"),
        whole=NEAR,
        chunks=NEAR,
    ),
)


def round_weights(applied: torch.nn.Module, unet: torch.nn.Module, stored: torch.dtype) -> None:
    """Round the weights of `unet` that `applied` stores in fewer bits."""
    of = dict(applied.named_parameters())
    for name, parameter in unet.named_parameters():
        if of[name].dtype == stored:
            parameter.data = parameter.data.to(stored).float()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_every_mechanism_works_with_it_or_refuses_it(way: Way, tmp_path: Path) -> None:
    unet, expected = make_unet(**ONE_LEVEL), make_unet(**ONE_LEVEL)
    way.apply(unet, tmp_path)
    if way.stored is not None:
        round_weights(unet, expected, way.stored)
    own, plain = call(unet), call(expected)
    for name, config in MECHANISMS.items():
        for chunk in (None, 2):
            outcome = way.apart.get(name, (way.whole, way.chunks))[chunk is not None]
            settings = dataclasses.replace(config, chunk=chunk)
            with stem.enabled(expected, settings):
                without = call(expected)
            with stem.enabled(unet, settings):
                if outcome == REFUSED:
                    with pytest.raises(ValueError, match=r"^block-level offloading takes"):
                        call(unet)
                else:
                    assert relative(call(unet), without) <= BOUNDS[outcome], (name, chunk)
            assert torch.equal(call(unet), own), (name, chunk)
            assert name == "per frame" or not torch.equal(plain, without)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [WAYS[1], WAYS[3], WAYS[7]], ids=lambda way: way.name)
def test_every_family_works_with_it(way: Way, kind: str, tmp_path: Path) -> None:
    model, expected, inputs = make_model(kind), make_model(kind), model_inputs(kind)
    way.apply(model, tmp_path)
    if way.stored is not None:
        round_weights(model, expected, way.stored)
    own = call_model(model, inputs)
    config = StemConfig(num_bases=4, temperature=0.1, num_frames=FRAMES)
    with stem.enabled(model, config), stem.enabled(expected, config):
        found, without = call_model(model, inputs), call_model(expected, inputs)
    assert relative(found, without) <= BOUNDS[way.whole]
    assert torch.equal(call_model(model, inputs), own)
    assert not torch.equal(found, own)


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.parametrize("chunk", [None, 2])
def test_what_is_on_goes_where_the_unet_goes(
    name: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The meta device computes shapes only, but no operation takes tensors of it and of the CPU.
    unet = make_unet(**ONE_LEVEL)
    (latents, timestep, text), keywords = unet_inputs()
    there = (latents.to("meta"), timestep, text.to("meta"))
    # It has no autocast, even to switch off.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: torch.no_grad())
    recording = Recording()
    config = dataclasses.replace(MECHANISMS[name], chunk=chunk)
    with stem.enabled(unet, config, hooks=Hooks(recording=recording)) as handle:
        call(unet)
        handle.hooks.remove("recording")
        unet.to("meta")
        for replay in (None, *([Replay(recording.found)] if recording.found else [])):
            if replay is not None:
                handle.hooks.add("replay", replay)
            with torch.no_grad():
                found = unet(*there, **keywords)[0]
            assert found.is_meta
            assert found.shape == latents.shape


def table() -> str:
    """The table of docs/small-cards.md."""
    rows = ["| Way | All frames at once | In chunks | |", "| --- | --- | --- | --- |"]
    for way in WAYS:
        cells = [
            "; ".join(
                [
                    most,
                    *(
                        f"{name}: {each[at]}"
                        for name, each in way.apart.items()
                        if each[at] != most
                    ),
                ]
            )
            for at, most in enumerate((way.whole, way.chunks))
        ]
        rows.append(f"| {' | '.join([way.name, *cells, way.note])} |")
    return "\n".join(rows)


def test_the_page_has_this_table() -> None:
    found = re.search(r"<!-- table -->\n(.*?)\n<!-- end -->", PAGE.read_text(), re.DOTALL)
    assert found is not None
    assert found[1].strip() == table(), f"write it anew:\n{table()}"

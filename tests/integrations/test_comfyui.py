"""ComfyUI's nodes, with ComfyUI itself (COMFYUI=its folder) or its patch calls as recorded."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
import tomllib
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy_protocol as protocol
import pytest
import torch

ROOT = Path(__file__).parents[2]
PACK = ROOT / "integrations" / "comfyui"
IMAGES, TOKENS = 4, 256
"""Images of each of two branches, and tokens of an image, in the calls that are made here."""
DEFAULTS = {
    "num_bases": 256, "frames": 0, "start_percent": 0.0, "end_percent": 1.0, "min_tokens": 0,
    "dense_blocks": "", "calibration": "moments",
}  # fmt: skip


@pytest.fixture(scope="module")
def comfyui() -> Iterator[protocol.Itself | protocol.Recorded]:
    with protocol.comfyui() as found:
        yield found


@pytest.fixture(scope="module")
def pack(comfyui: object) -> Any:
    """The pack, imported as ComfyUI imports it."""
    spec = importlib.util.spec_from_file_location(
        "stem_nodes", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["stem_nodes"] = module
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.partition(".")[0] == "stem_nodes"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def stem(pack: Any) -> Any:
    """A function that patches a model, with the node's defaults."""
    node = pack.NODE_CLASS_MAPPINGS["StemAttention"]()
    return lambda model, **options: node.patch(model, **{**DEFAULTS, **options})[0]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def patches(model: Any) -> dict[tuple[Any, ...], Any]:
    return model.model_options["transformer_options"]["patches_replace"]["attn1"]


def drawn(seed: int = 0) -> torch.Tensor:
    """Query, key and value of two branches."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2 * IMAGES, TOKENS, protocol.CALLS[0][3], generator=generator)


def called(model: Any, qkv: Iterable[torch.Tensor], **changes: Any) -> torch.Tensor:
    """What the patch of the first block makes of a call."""
    block, _, _, channels = protocol.CALLS[0]
    images = {"original_shape": [2 * IMAGES, 4, 16, 16]}
    options = {**protocol.call_options(1.0, channels), **images, **changes}
    return patches(model)[block](*qkv, options)


def test_the_recorded_calls_are_those_of_comfyui(comfyui: Any, pack: Any) -> None:
    if isinstance(comfyui, protocol.Recorded):
        pytest.skip(
            "ComfyUI is no package and needs torchvision and torchaudio: its calls are replayed as "
            "recorded from 0.3.64; COMFYUI=<its folder> runs these tests against ComfyUI itself"
        )
    model, calls, told = comfyui.model(), [], []

    def record(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Any) -> torch.Tensor:
        assert q.shape == k.shape == v.shape
        calls.append((options["block"], options["block_index"], *q.shape[1:]))
        told.append({name: options[name] for name in protocol.OPTIONS})
        assert torch.allclose(options["sigmas"], torch.tensor(sigma(len(calls))), rtol=1e-2)
        return pack.attention.dense(q, k, v, options)

    def sigma(call: int) -> float:
        return protocol.SIGMAS[(call - 1) // len(protocol.CALLS)]

    recording = model.clone()
    for block in pack.attention.self_attentions(model.model.diffusion_model).values():
        recording.set_model_attn1_replace(record, *block)
    result = comfyui.run(recording)
    assert calls == protocol.CALLS * protocol.STEPS
    assert told == [protocol.OPTIONS] * len(calls)
    assert torch.equal(result, comfyui.run(model))
    for percent in (0.0, 0.25, 0.9, 1.0):
        found = model.get_model_object("model_sampling").percent_to_sigma(percent)
        assert found == pytest.approx(protocol.percent_to_sigma(percent), rel=1e-2)


def test_as_many_bases_as_tokens_change_nothing_and_fewer_do(comfyui: Any, stem: Any) -> None:
    model = comfyui.model()
    plain = comfyui.run(model)
    whole = comfyui.run(stem(model, frames=1, num_bases=protocol.SIZE**2))
    assert distance(whole, plain) < 1e-4
    assert distance(comfyui.run(stem(model, frames=1, num_bases=64)), plain) > 1e-3
    assert torch.equal(comfyui.run(model), plain)  # the model that came in was not touched


def test_two_models_in_one_process(comfyui: Any, stem: Any) -> None:
    first, second = comfyui.model(0), comfyui.model(1)
    plain = comfyui.run(first), comfyui.run(second)
    few, one = stem(first, num_bases=16), stem(second, frames=1, num_bases=protocol.SIZE**2)
    found = comfyui.run(few)
    assert distance(found, plain[0]) > 1e-3
    assert distance(comfyui.run(one), plain[1]) < 1e-4
    assert torch.equal(comfyui.run(few), found)
    assert torch.equal(comfyui.run(first), plain[0])
    assert torch.equal(comfyui.run(second), plain[1])


def test_a_video_attends_to_all_of_its_frames_and_to_no_other_branch(
    comfyui: Any, stem: Any
) -> None:
    model, qkv = comfyui.model(), drawn()
    folded = qkv.unflatten(1, (2, IMAGES)).flatten(2, 3)
    expected = protocol.attention(*folded, protocol.HEADS).reshape(qkv[0].shape)
    exact = stem(model, num_bases=IMAGES * TOKENS)
    assert torch.allclose(called(exact, qkv), expected, atol=1e-6)
    # Two videos of a branch, and bases in place of all tokens: the same holds.
    for options, rows in (({"num_bases": 16}, 4), ({"num_bases": 16, "frames": 2}, 2)):
        patched = stem(model, **options)
        other = qkv.clone()
        other[:, rows:] = drawn(1)[:, rows:]
        before, after = called(patched, qkv), called(patched, other)
        assert torch.equal(before[:rows], after[:rows])
        other = qkv.clone()
        other[1:, 0] = drawn(1)[1:, 0]
        changed = (called(patched, other) != before).flatten(1).any(1).tolist()
        assert changed == [True] * rows + [False] * (2 * IMAGES - rows)


def test_tiles_of_an_image_are_put_together(comfyui: Any, stem: Any) -> None:
    patched, (q, k, v) = stem(comfyui.model(), frames=1, num_bases=16), drawn()
    tiles = q.unflatten(1, (4, -1)).flatten(0, 1)  # HyperTile cuts queries alone
    found = called(patched, (tiles, k, v))
    assert found.shape == tiles.shape
    assert torch.allclose(found.reshape(q.shape), called(patched, (q, k, v)))


def test_noise_outside_of_the_range_leaves_layers_as_they_are(comfyui: Any, stem: Any) -> None:
    model, qkv = comfyui.model(), drawn()
    plain = protocol.attention(*qkv, protocol.HEADS)
    late = stem(model, num_bases=16, start_percent=0.5)
    limit = model.get_model_object("model_sampling").percent_to_sigma(0.5)
    for noise, untouched in ((limit * 1.01, True), (limit, False), (0.03, False)):
        found = called(late, qkv, sigmas=torch.full((IMAGES,), noise))
        assert torch.allclose(found, plain, atol=1e-6) == untouched
    # A second node fills what the first leaves.
    both = stem(stem(model, num_bases=16, end_percent=0.5), num_bases=32, start_percent=0.5)
    for noise, bases in ((14.0, 16), (0.03, 32)):
        sigmas = torch.full((IMAGES,), noise)
        alone = stem(model, num_bases=bases)
        assert torch.equal(called(both, qkv, sigmas=sigmas), called(alone, qkv, sigmas=sigmas))


def test_small_layers_and_named_blocks_stay(comfyui: Any, stem: Any) -> None:
    model, qkv = comfyui.model(), drawn()
    plain = protocol.attention(*qkv, protocol.HEADS)
    for tokens, untouched in ((TOKENS, False), (TOKENS + 1, True)):
        found = called(stem(model, num_bases=16, min_tokens=tokens), qkv)
        assert torch.allclose(found, plain, atol=1e-6) == untouched
    blocks = {block for block, *_ in protocol.CALLS}
    assert patches(stem(model)).keys() == blocks
    some = stem(model, dense_blocks="middle_0, output_3")
    assert patches(some).keys() == blocks - {("middle", 0), ("output", 3)}


def test_half_precision_stays(comfyui: Any, stem: Any) -> None:
    patched, qkv = stem(comfyui.model(), num_bases=16), drawn()
    found = called(patched, qkv.bfloat16())
    assert found.dtype is torch.bfloat16
    assert distance(found.float(), called(patched, qkv)) < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_percent": 0.6, "end_percent": 0.5}, "start_percent is 0.6 and end_percent 0.5"),
        ({"dense_blocks": "input_2"}, "names input_2; this model has input_1, middle_0, output_2"),
    ],
)
def test_options_that_do_not_fit(comfyui: Any, stem: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stem(comfyui.model(), **options)


def test_frames_that_do_not_divide_the_batch(comfyui: Any, stem: Any) -> None:
    with pytest.raises(ValueError, match="frames is 3 and the batch has 4 images"):
        called(stem(comfyui.model(), frames=3), drawn())


def test_models_that_are_refused(pack: Any) -> None:
    layers = pack.attention.self_attentions
    with pytest.raises(ValueError, match="the model is a SimpleNamespace; it must be a UNet"):
        layers(SimpleNamespace(double_blocks=[]))
    timed = SimpleNamespace(transformer_blocks=[], time_stack=[])
    unet = SimpleNamespace(input_blocks=[[timed]], middle_block=None, output_blocks=[])
    with pytest.raises(ValueError, match="has layers over time"):
        layers(unet)
    # as in Stable Diffusion's upscaler: no self-attention, but one to the prompt
    timed = SimpleNamespace(transformer_blocks=[SimpleNamespace(disable_self_attn=True)])
    unet.input_blocks = [[timed]]
    with pytest.raises(ValueError, match="has no self-attention"):
        layers(unet)


class Denoiser:
    """What ComfyUI gives a sampler, around a smooth function for the noise."""

    def __init__(self, sampling: Any = None) -> None:
        sampling = SimpleNamespace(sigma_data=1.0) if sampling is None else sampling
        self.inner_model = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=sampling))
        self.noise = torch.zeros(1)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **_: Any) -> torch.Tensor:
        level = sigma.view(-1, 1, 1, 1)
        return x - level * self.predicted(x / (level**2 + 1).sqrt(), level)

    def predicted(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x + x.roll(1, -1)) / 4 * sigma / (1 + sigma)


LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LEVELS = torch.tensor([14.6, 5.0, 2.0, 0.8, 0.3, 0.03, 0.0], dtype=torch.float64)


def inverted(pack: Any, iterations: int, model: Any = None, **arguments: Any) -> torch.Tensor:
    sampler = pack.NODE_CLASS_MAPPINGS["StemInvert"]().sampler(iterations)[0]
    arguments = {"sigmas": LEVELS, **arguments}
    return sampler.sampler_function(
        model or Denoiser(), LATENTS, **arguments, **sampler.extra_options
    )


def test_one_iteration_is_ddim_inversion(pack: Any) -> None:
    model, rising = Denoiser(), LEVELS.flip(0)
    kept = 1 / (1 + rising**2)
    latents = LATENTS
    for step in range(len(rising) - 1):
        noise = model.predicted(latents, rising[step + 1])
        clean = (latents - (1 - kept[step]).sqrt() * noise) / kept[step].sqrt()
        latents = kept[step + 1].sqrt() * clean + (1 - kept[step + 1]).sqrt() * noise
    assert torch.allclose(inverted(pack, 1) * kept[-1].sqrt(), latents)


def test_euler_leads_back_and_nearer_with_more_iterations(pack: Any) -> None:
    model, errors = Denoiser(), []
    for iterations in (1, 3, 30):
        x = inverted(pack, iterations)
        for high, low in pairwise(LEVELS):
            clean = model(x, high.expand(len(x)))
            x = x + (low - high) * (x - clean) / high
        errors.append(distance(x, LATENTS))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4


def test_inversions_that_are_refused(pack: Any) -> None:
    noisy = Denoiser()
    noisy.noise = torch.ones(1)
    with pytest.raises(ValueError, match="turn add_noise off"):
        inverted(pack, 1, noisy)
    with pytest.raises(ValueError, match="noise mask"):
        inverted(pack, 1, extra_args={"denoise_mask": torch.ones(1)})
    with pytest.raises(ValueError, match=r"sigmas rise from 0.0 to 14.6"):
        inverted(pack, 1, sigmas=LEVELS.flip(0))
    flow = sys.modules["comfy.model_sampling"].CONST()
    with pytest.raises(ValueError, match="rectified flow"):
        inverted(pack, 1, Denoiser(flow))


def test_the_pack_imports_stem_kernels_alone() -> None:
    imported = set()
    for path in PACK.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(str(node.module).partition(".")[0])
    assert imported - sys.stdlib_module_names == {"comfy", "stem_kernels", "torch"}


def test_the_registry_s_form(pack: Any) -> None:
    described = tomllib.loads((PACK / "pyproject.toml").read_text())
    assert described["project"].keys() >= {"name", "version", "description", "license"}
    assert described["tool"]["comfy"].keys() >= {"PublisherId", "DisplayName"}
    assert pack.NODE_CLASS_MAPPINGS.keys() == pack.NODE_DISPLAY_NAME_MAPPINGS.keys()
    page = (PACK / "README.md").read_text()
    for name, node in pack.NODE_CLASS_MAPPINGS.items():
        assert callable(getattr(node, node.FUNCTION))
        assert pack.NODE_DISPLAY_NAME_MAPPINGS[name] in page
        missing = [option for option in node.INPUT_TYPES()["required"] if f"`{option}`" not in page]
        assert not missing, f"name them in {PACK.name}/README.md"
    required = pack.NODE_CLASS_MAPPINGS["StemAttention"].INPUT_TYPES()["required"]
    defaults = {name: kind[1]["default"] for name, kind in required.items() if name != "model"}
    assert defaults == DEFAULTS


@pytest.mark.parametrize("name", ["stem_attention", "stem_invert_and_edit"])
def test_the_example_workflows_fit_the_nodes(pack: Any, name: str) -> None:
    workflow = json.loads((PACK / "example_workflows" / f"{name}.json").read_text())
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for _, start, output, end, target, kind in workflow["links"]:
        assert nodes[start]["outputs"][output]["type"] == kind
        assert nodes[end]["inputs"][target]["type"] == kind
    ours = [node for node in nodes.values() if node["type"] in pack.NODE_CLASS_MAPPINGS]
    assert ours
    for node in ours:
        required = pack.NODE_CLASS_MAPPINGS[node["type"]].INPUT_TYPES()["required"]
        assert {entry["name"] for entry in node["inputs"]} == required.keys()
        options = [kind[1]["default"] for key, kind in required.items() if key != "model"]
        assert node["widgets_values"] == options

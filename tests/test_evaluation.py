"""Metrics of edits against their formulas and other libraries, and what each says is missing."""

from __future__ import annotations

import enum
import importlib
import json
import math
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torchmetrics
from test_cli import run
from torch import nn
from torch.nn.functional import cosine_similarity, normalize

import stem
from stem import Video, evaluate, random_pipeline, write_video
from stem.evaluation import Evaluation
from stem.metrics import (
    Clip,
    UnmeasuredError,
    WorldJudge,
    estimate_flow,
    frame_accuracy,
    lpips,
    occluded,
    ssim,
    temporal_consistency,
    text_alignment,
    warped_ssim,
    world_flow,
)
from stem.metrics.unmeasured import install_torchvision, torchvision_module
from stem.toy import WorldEdit, sample_scene, world_edit

METRICS = [
    *("PSNR dB", "SSIM", "LPIPS", "CLIP-text x100", "Tem-Con", "Frame-Acc", "Warp-Err x1000"),
    *("WarpSSIM", "Q_edit = WarpSSIM x CLIP-text", "Q_edit = CLIP-text / Warp-Err"),
]
NO_CLIP = "hf download nobody/clip"


@pytest.fixture(scope="module")
def world() -> WorldEdit:
    return world_edit(40_500_000, "colour", 4)


@pytest.fixture
def no_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python takes a module that is None for one that is not installed."""
    for name in ("torchvision", "torchvision.models", "torchvision.models.optical_flow"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of torch's cache in which weights are looked for."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def drifting(count: int = 3, side: int = 32) -> torch.Tensor:
    """Smooth noise that moves two pixels to the left and one down from frame to frame."""
    wide = torch.rand(
        1, 3, side // 2 + 10, side // 2 + 10, generator=torch.Generator().manual_seed(0)
    )
    wide = nn.functional.interpolate(wide, scale_factor=2, mode="bicubic").clamp(0, 1)
    parts = [
        wide[0, :, count - t : count - t + side, 2 * t : 2 * t + side].permute(1, 2, 0)
        for t in range(count)
    ]
    return (torch.stack(parts) * 255).round().to(torch.uint8)


def test_the_two_directions_of_the_worlds_flow_tell_what_is_occluded() -> None:
    flow = world_flow(sample_scene(40_000_004), 6, 64)
    found = occluded(flow.forward, flow.backward)
    assert flow.occlusion.float().mean() > 0.01
    assert found[flow.occlusion].all()
    # Where it says more than the truth, between the pixels of an object's rim and others.
    assert (found != flow.occlusion).float().mean() < 0.01
    # Out of the picture on one side, and everywhere on the way there and back nowhere near.
    away = torch.tensor([-2.0, 1.0]).expand(1, 8, 8, 2)
    expected = torch.zeros(1, 8, 8, dtype=torch.bool)
    expected[:, :, :2] = True
    expected[:, 7:] = True
    assert torch.equal(occluded(away, -away), expected)
    assert occluded(away, away).all()


def test_warped_ssim_is_that_of_the_frame_before_along_the_flow() -> None:
    video = drifting()
    backward = torch.tensor([2.0, -1.0]).expand(2, 32, 32, 2)
    rows = (torch.arange(32) - 1).clamp(0)
    columns = (torch.arange(32) + 2).clamp(max=31)
    expected = ssim(video[:-1][:, rows][:, :, columns], video[1:])
    assert expected > 0.9
    assert warped_ssim(video, backward) == pytest.approx(expected, abs=1e-5)
    assert warped_ssim(video, torch.zeros_like(backward)) < 0.5
    with pytest.raises(ValueError, match=r"need a backward flow of \[2, 32, 32, 2\]"):
        warped_ssim(video, backward[:1])
    with pytest.raises(ValueError, match="window is 11x11"):
        warped_ssim(video[:, :8], backward[:, :8])


def test_dis_finds_the_motion_and_what_leaves_the_picture() -> None:
    flow = estimate_flow(drifting(), "dis")
    assert flow.name == "OpenCV DIS, preset medium"
    for found, moved in ((flow.forward, (-2, 1)), (flow.backward, (2, -1))):
        assert found.shape == (2, 32, 32, 2)
        assert (found[:, 4:-4, 4:-4] - torch.tensor(moved)).abs().median() < 0.1
    assert flow.occlusion[:, :, 0].all()
    assert not flow.occlusion[:, 4:-4, 4:-4].any()


def test_flows_that_cannot_be_had(no_torchvision: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="flow is 'farneback'; it must be one of dis, raft"):
        estimate_flow(drifting(), "farneback")
    with pytest.raises(UnmeasuredError, match="one frame has no flow"):
        estimate_flow(drifting(1))
    with pytest.raises(UnmeasuredError, match="torchvision is not installed; pip install torch=="):
        estimate_flow(drifting(), "raft")
    with pytest.raises(UnmeasuredError, match="at least 12 pixels a side, not 11"):
        estimate_flow(drifting(side=32)[:, :11], "dis")
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(
        UnmeasuredError, match="OpenCV is not installed; pip install opencv-python-headless"
    ):
        estimate_flow(drifting())


def test_torchvision_is_asked_for_in_the_build_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    command = (
        "pip install torch==2.13.0+cpu torchvision --index-url https://download.pytorch.org/whl/cpu"
    )
    assert install_torchvision() == command

    def fail(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(
        UnmeasuredError, match=r"does not load beside torch 2\.13\.0.*::nms"
    ) as caught:
        torchvision_module("torchvision.models")
    assert caught.value.remedy == f"pip uninstall torchvision && {command}"
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    assert install_torchvision() == "pip install torch==2.13.0 torchvision"


class Weights(enum.Enum):
    """As torchvision's enumerations of weights: a default with the address of its file."""

    C_T_SKHT_V2 = SimpleNamespace(url="https://host/models/raft_large-ff5fadd5.pth")
    DEFAULT = C_T_SKHT_V2

    @property
    def url(self) -> str:
        return str(self.value.url)


class Raft(nn.Module):
    """Stands in for RAFT: flows of ever more steps, [1, 2, h, w], two left and one down."""

    def forward(self, one: torch.Tensor, two: torch.Tensor) -> list[torch.Tensor]:
        for picture in (one, two):
            assert picture.shape[2] % 8 == picture.shape[3] % 8 == 0
            assert -1 <= picture.min() < -0.5
            assert 0.5 < picture.max() <= 1
        flow = torch.tensor([-2.0, 1.0])[None, :, None, None].expand(1, 2, *one.shape[2:])
        return [torch.zeros_like(flow), flow]


def stub(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """A module of torchvision in the place of whatever is installed."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    for key, value in contents.items():
        setattr(sys.modules[name], key, value)


def test_raft_is_taken_where_its_weights_are(monkeypatch: pytest.MonkeyPatch, hub: Path) -> None:
    def raft_large(*, weights: Any, progress: bool) -> Raft:
        assert weights is Weights.DEFAULT
        return Raft()

    module = "torchvision.models.optical_flow"
    stub(monkeypatch, module, Raft_Large_Weights=Weights, raft_large=raft_large)
    video = drifting(2, 140)[:, :130]
    with pytest.raises(UnmeasuredError, match=r"the weights raft_large-ff5fadd5\.pth are not in"):
        estimate_flow(video, "raft")
    assert estimate_flow(video).name.startswith("OpenCV DIS")
    (hub / "raft_large-ff5fadd5.pth").touch()
    with pytest.raises(UnmeasuredError, match="at least 128 pixels a side, not 64"):
        estimate_flow(video[:, :64], "raft")
    found = estimate_flow(video)
    assert found.name == "torchvision RAFT large, C_T_SKHT_V2"
    expected = torch.tensor([-2.0, 1.0]).expand(1, 130, 140, 2)
    assert torch.equal(found.forward, expected)
    assert torch.equal(found.backward, expected)
    assert found.occlusion.all()  # there and further on is not there and back


def alexnet_features() -> nn.Sequential:
    """AlexNet's, as in torchvision's `alexnet().features`."""
    pool, relu = nn.MaxPool2d(3, 2), nn.ReLU()
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, 4, 2), relu, pool, nn.Conv2d(64, 192, 5, padding=2), relu, pool),
        *(nn.Conv2d(192, 384, 3, padding=1), relu, nn.Conv2d(384, 256, 3, padding=1), relu),
        *(nn.Conv2d(256, 256, 3, padding=1), relu, pool),
    )


def test_lpips_weighs_the_squares_between_features(
    monkeypatch: pytest.MonkeyPatch, hub: Path
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = alexnet_features()
    weights = SimpleNamespace(DEFAULT=SimpleNamespace(url="https://host/alexnet-owt.pth"))
    stub(
        monkeypatch,
        "torchvision.models",
        AlexNet_Weights=weights,
        alexnet=lambda weights: SimpleNamespace(features=features),
    )
    sys.modules["torchvision"].models = sys.modules["torchvision.models"]
    import torchmetrics.functional.image.lpips as functional
    import torchmetrics.image.lpip as modular

    for module in (functional, modular):
        monkeypatch.setattr(module, "_TORCHVISION_AVAILABLE", True)
    video, original = drifting(3, 64)[1:], drifting(3, 64)[:-1]
    command = (
        "python -c 'from torchvision.models import AlexNet_Weights; "
        "AlexNet_Weights.DEFAULT.get_state_dict()'"
    )
    with pytest.raises(UnmeasuredError) as caught:
        lpips(video, original)
    assert caught.value.remedy == command
    (hub / "alexnet-owt.pth").touch()
    with pytest.raises(UnmeasuredError, match="at least 64 pixels a side, not 32"):
        lpips(video[:, :32], original[:, :32])
    assert lpips(original, original) == 0

    heads = torch.load(Path(functional.__file__).parent / "lpips_models" / "alex.pth", "cpu")
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    ours, theirs = (
        (((frames / 127.5 - 1) - shift) / scale).permute(0, 3, 1, 2) for frames in (video, original)
    )
    expected = torch.zeros(2)
    for layer, step in enumerate(features):
        ours, theirs = step(ours), step(theirs)
        if isinstance(step, nn.ReLU):
            squares = (normalize(ours) - normalize(theirs)).square()
            head = [1, 4, 7, 9, 11].index(layer)
            expected += (heads[f"lin{head}.model.1.weight"] * squares).sum(1).mean((1, 2))
    assert lpips(video, original) == pytest.approx(float(expected.mean()), rel=1e-4)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP model of random weights, in transformers' format."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    tokenizer = random_pipeline().tokenizer
    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    words = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id")}
    config = CLIPConfig(
        text_config={**tower, **words, "vocab_size": len(tokenizer)},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    folder = tmp_path_factory.mktemp("models") / "clip"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    return str(folder)


def test_clip_embeds_as_transformers_does(
    clip_folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import CLIPModel

    frames, texts = drifting(3), ["a red ball", "a blue star on a lake"]
    judge = Clip(clip_folder)
    assert judge.name == f"CLIP {clip_folder}"
    seen, said = judge.embed_frames(frames), judge.embed_texts(texts)
    assert seen.shape == (3, 8)
    assert said.shape == (2, 8)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    pixels = ((frames / 255 - mean) / deviation).permute(0, 3, 1, 2)
    tokens = random_pipeline().tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(pixel_values=pixels, **tokens)
    torch.testing.assert_close(normalize(seen), expected.image_embeds, atol=1e-4, rtol=0)
    torch.testing.assert_close(normalize(said), expected.text_embeds, atol=1e-5, rtol=0)
    # The model's logits are its cosines, times a factor.
    logits = expected.logits_per_image[:, 0] / model.logit_scale.exp().detach()
    assert text_alignment(seen, said[0]) == pytest.approx(100 * float(logits.mean()), abs=1e-2)
    judge.embed_texts(["a" + " duck" * 100])
    assert "CLIP reads 77 of" in caplog.text


def test_models_that_are_no_clip(clip_folder: str, tmp_path: Path) -> None:
    with pytest.raises(UnmeasuredError, match=f"is not on this machine; {NO_CLIP}"):
        Clip("nobody/clip")
    with pytest.raises(ValueError, match=r"no CLIP model can be loaded from .* Unrecognized"):
        Clip(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="it is a model of kind 'bert'"):
        Clip(str(tmp_path))
    from safetensors.torch import load_file, save_file

    for file in Path(clip_folder).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights: \['visual_projection.weight'\]"):
        Clip(str(tmp_path))


def test_the_figures_of_embeddings() -> None:
    frames = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]])
    source, target = torch.tensor([5.0, 0.0]), torch.tensor([0.0, 1.0])
    assert text_alignment(frames, target) == pytest.approx(100 * (0 + 0.8 + 1) / 3, abs=1e-4)
    assert temporal_consistency(frames) == pytest.approx((0.6 + 0.8) / 2)
    assert frame_accuracy(frames, source, target) == pytest.approx(2 / 3)
    between = torch.tensor([[1.0, 1.0]])
    assert frame_accuracy(between, torch.tensor([1.0, 0.0]), target) == 0
    with pytest.raises(UnmeasuredError, match="one frame has no next one"):
        temporal_consistency(between)
    with pytest.raises(UnmeasuredError, match="are the same to it"):
        frame_accuracy(frames, source, source)


def test_the_judge_of_the_world_in_the_place_of_clip(world: WorldEdit) -> None:
    judge = WorldJudge()
    before, after = judge.embed_texts([world.source.caption, world.exact.caption])
    assert cosine_similarity(before, after, dim=0) == pytest.approx(0.5)  # of the same shape
    exact, source = (judge.embed_frames(c.frames) for c in (world.exact, world.source))
    assert text_alignment(exact, after) == pytest.approx(100, abs=1e-4)
    assert text_alignment(source, after) == pytest.approx(50, abs=1e-4)
    assert frame_accuracy(exact, before, after) == 1
    assert frame_accuracy(source, before, after) == 0
    nothing = judge.embed_frames(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
    assert text_alignment(nothing, after) == 0
    with pytest.raises(ValueError, match="'a duck on a lake' names no object of the world"):
        judge.embed_texts(["a duck on a lake"])


def videos(edit: WorldEdit) -> tuple[Video, Video]:
    fps = Fraction(8)
    return Video(edit.source.frames, fps, name="ours"), Video(edit.exact.frames, fps, name="theirs")


def values(found: Evaluation) -> dict[str, float | None]:
    return {figure.metric: figure.value for figure in found.figures}


def test_an_edit_of_the_world_under_its_exact_flow(world: WorldEdit, no_torchvision: None) -> None:
    source, edit = videos(world)
    flow = world_flow(world.scene, 4, 64)
    assert torch.equal(flow.forward, world.source.flow)
    found = evaluate(
        *(source, edit, world.source.caption, world.exact.caption), flow=flow, clip=WorldJudge()
    )
    assert list(values(found)) == METRICS
    assert found["LPIPS"].value is None
    assert found["LPIPS"].remedy == install_torchvision()
    for metric in METRICS:
        by = found[metric].measured_by
        of_flow = "Warp" in metric
        assert ("exact flow of the world" in by) == of_flow
        assert ("judge of the world" in by) == any(w in metric for w in ("CLIP", "Tem", "Frame"))
        assert ("11x11, sigma 1.5, RGB" in by) == ("SSIM" in metric)
    shown = torchmetrics.functional.image.peak_signal_noise_ratio(
        *(v.frames.permute(0, 3, 1, 2) / 255 for v in (edit, source)),
        data_range=1.0,
        dim=(1, 2, 3),
        reduction="elementwise_mean",
    )
    assert found["PSNR dB"].value == pytest.approx(float(shown), abs=1e-3)
    text, error, warped = (
        found[name].value for name in ("CLIP-text x100", "Warp-Err x1000", "WarpSSIM")
    )
    assert text is not None
    assert error is not None
    assert warped is not None
    assert text == pytest.approx(100, abs=1e-4)
    assert found["Q_edit = WarpSSIM x CLIP-text"].value == warped * text
    assert found["Q_edit = CLIP-text / Warp-Err"].value == text / error
    # The frames shuffled: no flow of the source explains them.
    shuffled = Video(edit.frames[[0, 2, 1, 3]], edit.fps)
    worse = evaluate(
        *(source, shuffled, world.source.caption, world.exact.caption),
        flow=flow,
        clip=WorldJudge(),
    )
    assert worse["Warp-Err x1000"].value > error
    assert worse["WarpSSIM"].value < warped
    with pytest.raises(KeyError, match="there are PSNR dB, SSIM"):
        found["VMAF"]


def test_what_is_missing_is_said(world: WorldEdit, no_torchvision: None, clip_folder: str) -> None:
    source, edit = videos(world)
    found = evaluate(source, edit, "a", "b", flow="raft", clip="nobody/clip")
    measured = {name for name, value in values(found).items() if value is not None}
    assert measured == {"PSNR dB", "SSIM"}
    assert {f.remedy for f in found.figures if f.value is None} == {
        install_torchvision(),
        NO_CLIP,
    }
    assert all(f.missing for f in found.figures if f.value is None)
    found = evaluate(source, edit, "", "b", clip=clip_folder)
    absent = {figure.metric: figure.remedy for figure in found.figures if figure.value is None}
    assert absent == {"LPIPS": install_torchvision(), "Frame-Acc": "give --source-prompt"}
    assert found["Warp-Err x1000"].measured_by == "flow of the source: OpenCV DIS, preset medium"
    still = Video(source.frames[:1], source.fps)
    one = evaluate(still, still, "a", "b", clip=clip_folder)
    assert one["PSNR dB"].value == math.inf
    for name in ("Tem-Con", "Warp-Err x1000", "WarpSSIM", "Q_edit = WarpSSIM x CLIP-text"):
        assert one[name].remedy == "give videos of at least 2 frames"
    constant = Video(torch.full_like(source.frames, 100), source.fps)
    found = evaluate(constant, constant, "a", "b", clip=clip_folder)
    assert found["Q_edit = CLIP-text / Warp-Err"].value == math.inf


def test_a_cut_has_no_warp_error(world: WorldEdit) -> None:
    source, edit = videos(world)
    flow = world_flow(world.scene, 4, 64)
    flow.occlusion[2] = True
    found = evaluate(
        *(source, edit, world.source.caption, world.exact.caption), flow=flow, clip=WorldJudge()
    )
    assert "no pixel of frame 2 is seen in the next" in found["Warp-Err x1000"].missing
    assert found["WarpSSIM"].value is not None


def cut(video: Video, change: Callable[[torch.Tensor], torch.Tensor]) -> Video:
    return Video(change(video.frames), video.fps)


def test_videos_that_do_not_belong_together(world: WorldEdit) -> None:
    source, edit = videos(world)
    with pytest.raises(ValueError, match=r"has 4 frames and the edit 3; .* --frames 3"):
        evaluate(source, cut(edit, lambda f: f[:3]), "a", "b")
    with pytest.raises(ValueError, match=r"is 64x64 pixels and the edit 32x64; .* --size 32x64"):
        evaluate(source, cut(edit, lambda f: f[:, :, :32]), "a", "b")
    with pytest.raises(ValueError, match="prompt is empty"):
        evaluate(source, edit, "a", " ")
    assert stem.evaluate is evaluate


def test_the_command(
    world: WorldEdit,
    no_torchvision: None,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    paths = [str(tmp_path / name) for name in ("source.mp4", "edit.mp4")]
    wide = nn.functional.pad(world.source.frames, (0, 0, 2, 2))  # edits are cropped to 64
    write_video(paths[0], wide, 8)
    write_video(paths[1], world.exact.frames, 8)
    figures = tmp_path / "new" / "figures.json"
    prompts = ("--source-prompt", world.source.caption, "--prompt", world.exact.caption)
    arguments = (*prompts, "--clip", "judge", "--flow", "dis", "--json", str(figures))
    assert run("evaluate", *paths, *arguments) == 0
    printed = capfd.readouterr().out
    assert "68x64 was centre-cropped to 64x64" in printed
    assert f"missing: LPIPS: torchvision is not installed; {install_torchvision()}" in printed
    document = json.loads(figures.read_text())
    assert [figure["metric"] for figure in document["figures"]] == METRICS
    for figure in document["figures"]:
        assert figure["metric"] in printed
        if figure["value"] is not None:
            assert f"{figure['value']:.4g}" in printed
    assert document["provenance"]["versions"]["torchvision"]
    assert run("evaluate", *paths, "--prompt", "b", "--clip", "nobody/clip") == 0
    assert f"not on this machine; {NO_CLIP}" in capfd.readouterr().out
    assert run("evaluate", *paths, "--prompt", "b", "--frames", "2") == 2
    assert "the source has 2 frames and the edit 4" in capfd.readouterr().err
    assert run("evaluate", *paths, "--prompt", "b", "--flow", "horn") == 2
    assert "take one of dis, raft" in capfd.readouterr().err

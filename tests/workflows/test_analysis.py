"""Features along the flow: which features, how they are warped and compared, what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from diffusers import UNet2DConditionModel
from inversions import clip
from PIL import Image
from pipelines import make_pipeline, make_unet
from ranks import one_thread, start

import stem
from benchmarks.studies.features import run as features
from benchmarks.studies.quality.measure import Source
from stem.attention.features import LastFeatures, last_self_attention
from stem.diffusion.pipeline import encode_frames
from stem.metrics import Flow, estimate_flow, similarity_maps, warped_similarity, world_flow
from stem.report.analysis_files import Shown, feature_picture, warped_former
from stem.report.pages.contents import read_report
from stem.report.projection import ColourProjection
from stem.workflows.analysis import analyse, feature_curve
from stem.world import render, sample_scene

OPTIONS = {"num_bases": 8}


def shift(frames: int, height: int, width: int, dx: float = 1.0) -> Flow:
    """The flow of a video that moves to the right."""
    there = torch.zeros(frames - 1, height, width, 2)
    there[..., 0] = dx
    hidden = torch.zeros(frames - 1, height, width, dtype=torch.bool)
    lost, new = hidden.clone(), hidden.clone()
    lost[..., -1], new[..., 0] = True, True
    return Flow("shift", there, -there, lost, new)


def curve(method: str = "stem", flow: Flow | None = None, **settings: Any) -> Any:
    pipeline = make_pipeline()
    latents = encode_frames(pipeline, clip().frames)
    settings = {"options": OPTIONS if method == "stem" else None, **settings}
    flow = flow or shift(3, 16, 24)
    return feature_curve(
        pipeline, latents, "a duck", method, flow, timestep=501, num_steps=2, **settings
    )


def test_the_layer_is_the_one_of_the_paper() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel()  # of Stable Diffusion 1.x, but for the text's width
    name, layer = last_self_attention(unet)
    assert name == "up_blocks.3.attentions.2.transformer_blocks.0.attn1"
    assert layer is unet.up_blocks[3].attentions[2].transformer_blocks[0].attn1


def test_features_are_what_the_layer_puts_out_in_the_latest_call() -> None:
    unet = make_unet()
    last = LastFeatures(unet)
    seen: list[torch.Tensor] = []
    _, layer = last_self_attention(unet)
    layer.register_forward_hook(lambda module, given, output: seen.append(output))
    with torch.no_grad():
        for seed in range(2):
            sample = torch.randn(3, 4, 8, 6, generator=torch.Generator().manual_seed(seed))
            unet(sample, torch.tensor(1), torch.zeros(3, 2, 16))
    maps = last.maps(3, 8, 6)
    assert maps.shape == (3, 32, 8, 6)
    assert torch.equal(maps[2, :, 4, 5], seen[1][2, 4 * 6 + 5])
    with pytest.raises(RuntimeError, match=r"up_blocks.* gave 3 of 4 frames"):
        last.maps(4, 8, 6)
    last.remove()
    before = len(last._parts)
    with torch.no_grad():
        unet(sample, torch.tensor(1), torch.zeros(3, 2, 16))
    assert len(last._parts) == before


def test_features_may_be_of_half_the_latents_size() -> None:
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
    ).eval()  # as Stable Diffusion XL, no attention at the finest level
    last = LastFeatures(unet)
    assert last.layer.startswith("up_blocks.0.")
    with torch.no_grad():
        unet(torch.randn(2, 4, 6, 10), torch.tensor(1), torch.zeros(2, 2, 16))
    assert last.maps(2, 6, 10).shape == (2, 32, 3, 5)


def test_features_that_move_with_the_flow_are_alike() -> None:
    wide = torch.randn(1, 5, 4, 9, generator=torch.Generator().manual_seed(0))
    maps = torch.cat([wide[..., 2:8], wide[..., 1:7], wide[..., :6]])  # moves to the right
    flow = shift(3, 4, 6)
    torch.testing.assert_close(warped_former(maps, flow)[..., 1:], maps[1:, ..., 1:])
    back = flow.reversed()
    similarity = similarity_maps(maps.flip(0), back.forward, back.occlusion).flip(0)
    torch.testing.assert_close(similarity[..., 1:], torch.ones(2, 4, 5))
    assert similarity[..., 0].max() < 0.99  # comes into the picture
    assert warped_similarity(maps.flip(0), back.forward, back.occlusion) == pytest.approx(1)
    wrong = shift(3, 4, 6, dx=-1.0).reversed()
    assert warped_similarity(maps.flip(0), wrong.forward, wrong.occlusion) < 0.5


@pytest.mark.parametrize("method", ["ddim", "stem"])
def test_a_curve_compares_the_former_frames_features_warped(method: str) -> None:
    # Latents are of half the size, so that the flow is, too.
    found = curve(method, shift(3, 16, 24, dx=2.0))
    assert list(found.similarity) == [1, 501]
    maps = found.features
    assert maps.shape == (3, 32, 8, 12)
    # The former frame's cells, a cell to the left, at every cell but those at the left rim.
    cosines = torch.nn.functional.cosine_similarity(maps[:-1, ..., :-1], maps[1:, ..., 1:])
    assert found.similarity[501] == pytest.approx(float(cosines.mean()), abs=1e-6)
    assert found.mean == pytest.approx(sum(found.similarity.values()) / 2)
    assert not hasattr(make_pipeline().unet, "_stem_handle")


@pytest.mark.parametrize("method", ["ddim", "stem"])
def test_chunks_change_nothing(method: str) -> None:
    whole, parts = curve(method), curve(method, chunk=2)
    torch.testing.assert_close(parts.features, whole.features, rtol=1e-4, atol=1e-5)
    assert parts.similarity == pytest.approx(whole.similarity, abs=1e-5)


def test_a_flow_reversed_is_that_of_the_reversed_video() -> None:
    scene = sample_scene(3)
    flow = world_flow(scene, 4, 16)
    backwards = render(scene, 4, 16, span=(1.0, 0.0))
    assert torch.equal(flow.reversed().forward, backwards.flow)
    assert torch.equal(flow.reversed().occlusion, backwards.occlusion)
    frames = render(scene, 4, 16).frames
    estimated, reverse = (
        estimate_flow(frames, "dis").reversed(),
        estimate_flow(frames.flip(0), "dis"),
    )
    assert torch.equal(estimated.forward, reverse.forward)
    assert torch.equal(estimated.occlusion, reverse.occlusion)


def test_a_flow_resized_is_in_the_smaller_pictures_pixels() -> None:
    small = shift(2, 8, 12, dx=3.0).resized(4, 4)
    torch.testing.assert_close(small.forward, shift(2, 4, 4, dx=1.0).forward)
    torch.testing.assert_close(small.backward, shift(2, 4, 4, dx=-1.0).forward)
    assert not small.occlusion.any()  # a third of a cell
    assert shift(2, 8, 12).resized(8, 6).occlusion[..., -1].all()  # half of one
    flow = shift(2, 8, 12)
    assert flow.resized(8, 12) is flow


def test_colours_are_of_one_fit() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(2, 6, 3, 4, generator=generator)
    two = 3 * torch.randn(2, 6, 3, 4, generator=generator) + 1
    projection = ColourProjection([one, two])
    rows = torch.cat([one, two]).permute(0, 2, 3, 1).flatten(0, 2).double()
    _, _, axes = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    torch.testing.assert_close((projection.axes @ axes[:3].mT).abs(), torch.eye(3).double())
    assert (projection.axes.gather(1, projection.axes.abs().argmax(1, keepdim=True)) > 0).all()
    # A feature has the same colour wherever it stands.
    moved = two.clone()
    moved[0, :, 0, 0] = one[1, :, 2, 3]
    assert torch.equal(projection.colours(moved)[0, 0, 0], projection.colours(one)[1, 2, 3])
    first = (rows - rows.mean(0)) @ projection.axes[0]
    shown = torch.cat([projection.colours(one), projection.colours(two)])[..., 0].flatten()
    assert shown[first.argmin()] == 0
    assert shown[first.argmax()] == 255
    assert torch.stack([shown.double(), first]).corrcoef()[0, 1] > 0.98


def test_the_picture_shows_warped_features_and_their_similarity() -> None:
    wide = torch.randn(1, 5, 4, 9, generator=torch.Generator().manual_seed(0))
    steady = torch.cat([wide[..., 2:8], wide[..., 1:7], wide[..., :6]])
    other = torch.randn(3, 5, 4, 6, generator=torch.Generator().manual_seed(1))
    frames = torch.zeros(3, 32, 48, 3, dtype=torch.uint8)
    shown = Shown({"steady": steady, "other": other}, shift(3, 4, 6), 501)
    picture = feature_picture(frames, shown)
    width, height = 4 * 48, 4 * 32 + 24
    assert picture.size == (2 * width, 7 * height)

    def cells(line: int, column: int) -> torch.Tensor:
        corner = (column * width, line * height + 24)
        box = (*corner, corner[0] + width, corner[1] + height - 24)
        cut = picture.crop(box).resize((6, 4), Image.Resampling.NEAREST)
        return torch.frombuffer(bytearray(cut.tobytes()), dtype=torch.uint8).view(4, 6, 3)

    for column in range(2):
        own, warped, similarity = (cells(line, column) for line in (1, 2, 3))
        assert (own.int() - warped.int())[:, 1:].abs().max() <= 1
        assert (similarity[:, 1:] == 255).all()
        assert (similarity[:, 0] == similarity[0, 0]).all()
        assert similarity[0, 0, 2] > similarity[0, 0, 0]  # blue: not seen before
    assert cells(6, 0)[:, 1:].min() < 100


def test_the_command_writes_picture_plot_and_figures(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    video = tmp_path / "clip.mp4"
    stem.write_video(video, render(sample_scene(1), 3, 64).frames, 8)
    arguments = [
        *("analyse", str(video), "--prompt", "a ball", "--size", "32", "--steps", "2"),
        *("--methods", "ddim,stem", "--flow", "dis", "--timestep", "0"),
        *("--option", "stem.num_bases=8", "--out", str(tmp_path / "out")),
    ]
    assert run(*arguments) == 0
    (folder,) = (tmp_path / "out").iterdir()
    printed = capfd.readouterr().out
    for part in ("ddim", "stem", "flow: OpenCV DIS, preset medium", f"{folder}/analysis.png\n"):
        assert part in printed
    document = json.loads((folder / "analysis.json").read_text())
    assert document["flow"] == "OpenCV DIS, preset medium"
    assert document["layer"] == "up_blocks.2.attentions.1.transformer_blocks.0.attn1"
    assert document["features"] == [80, 8, 8]
    assert document["timestep_shown"] == 1
    assert "one fit over all methods" in document["pca"]
    assert document["provenance"]["versions"]["torch"] == torch.__version__
    for method in ("ddim", "stem"):
        assert list(document["similarity"][method]) == ["1", "501"]
        assert all(0 < value <= 1 for value in document["similarity"][method].values())
    assert Image.open(folder / "analysis.png").size == (2 * 128, 7 * (128 + 24))
    assert Image.open(folder / "analysis-plot.png").size[0] > 500
    assert run("report", str(folder)) == 0
    html = (folder / "report.html").read_text()
    assert html.count('<img src="data:image/png;base64,') == 2
    assert "<script" not in html  # nothing plays
    report = read_report(folder)
    curves, features = report.sections
    assert (report.kind, report.facts[0]) == ("Analysis", "3 frames, 32×32")
    assert curves.pictures[0].png == (folder / "analysis-plot.png").read_bytes()
    assert features.pictures[0].png == (folder / "analysis.png").read_bytes()
    lowest = min(document["similarity"]["stem"].items(), key=lambda pair: pair[1])
    mean = f"{document['mean']['stem']:.4f}"
    assert curves.tables[0].rows[1] == ("stem", mean, f"{lowest[1]:.4f}", lowest[0])
    assert features.details["Settings"]["stem"] == [("num bases", "8")]
    assert ("layer", document["layer"]) in features.details["Settings"]["Run"]
    (folder / "analysis.png").write_bytes(b"")
    assert run("report", str(folder)) == 2
    assert "are not those that it was written with" in capfd.readouterr().err
    assert run(*arguments[:-2], "--out", str(tmp_path), "--frames", "1") == 2
    assert "at least 2 frames" in capfd.readouterr().err


def test_a_world_video_is_analysed_under_its_exact_flow(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *("analyse", "world:3", "--size", "32", "--steps", "1", "--methods", "ddim"),
        *("--out", str(tmp_path), "--frames"),
    ]
    assert run(*arguments, "2") == 0
    (file,) = tmp_path.glob("world-3-*/analysis.json")
    document = json.loads(file.read_text())
    assert document["flow"] == "exact flow of the world"
    assert document["prompt"] == render(sample_scene(3), 2, 32).caption
    assert document["video"]["frames"] == 2
    for frames, extra, reason in (
        ("1:4", (), "a world video takes a seed"),
        ("4", ("--size", "36"), "a multiple of 8"),
        ("1", (), "at least 2"),
    ):
        assert run(*arguments, frames, *extra) == 2
        assert reason in " ".join(capfd.readouterr().err.replace("│", " ").split())


def analysed(out: Path, group: Any = None) -> str:
    """What an analysis of the three frames of `clip` in chunks of one found, as JSON."""
    settings: dict[str, Any] = {"flow": shift(3, 16, 24), "num_steps": 2, "progress": False}
    found = analyse(
        make_pipeline(), clip(), "a duck", out, options={"stem": OPTIONS}, chunk=1, group=group,
        **settings,
    )  # fmt: skip
    sums = {
        name: [list(each.similarity.items()), each.features.double().sum((1, 2, 3)).tolist()]
        for name, each in found.curves.items()
    }
    return json.dumps([str(found.sheet.relative_to(out)), sums])


def test_processes_find_what_one_finds(tmp_path: Path) -> None:
    body = "print(analysed(root / 'two', dist.group.WORLD))"
    processes = start(__name__, tmp_path, 2, body)
    for process in processes:
        assert process.ended() == 0, process.errors.read_text()[-2000:]
    with one_thread():
        alone = analysed(tmp_path / "one")
    assert [process.lines() for process in processes] == [[alone], [alone]]
    one, two = ({path.name: path for path in tmp_path.glob(f"{n}/*/*")} for n in ("one", "two"))
    assert set(one) == set(two) == {"analysis.json", "analysis.png", "analysis-plot.png"}
    assert one["analysis.png"].read_bytes() == two["analysis.png"].read_bytes()


def test_what_cannot_be_analysed_is_said_before_any_work(tmp_path: Path) -> None:
    for settings, reason in (
        ({"options": {"stem": {"fit_frames": 2}}}, "bases of all frames"),
        ({"methods": []}, "at least one name"),
        ({"methods": ["dense"]}, "must be one of"),
        ({"flow": "farneback"}, "must be one of dis, raft"),
        ({"num_steps": 3}, "do not divide"),
        ({"chunk": 0}, "chunk is 0"),
    ):
        with pytest.raises(ValueError, match=reason):
            analyse(make_pipeline(), clip(), "", tmp_path, **settings)
    assert list(tmp_path.iterdir()) == []


def test_the_study_goes_on_with_the_next_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "FRAMES", 2)
    monkeypatch.setattr(features, "METHODS", ("ddim", "stem"))
    monkeypatch.setattr(features, "SEEDS", range(features.FIRST_SEED, features.FIRST_SEED + 1))
    frames = render(sample_scene(features.FIRST_SEED), 2, features.SIZE)
    videos = {
        features.PICTURED: Source(frames.frames, "", frames.flow, frames.occlusion),
        features.CLIP: Source(frames.frames, ""),
    }
    monkeypatch.setattr(features, "sources", lambda count: videos)
    threads, out = torch.get_num_threads(), tmp_path / "features.json"
    try:
        features.main(out, 2)
        first = out.read_text()
        monkeypatch.setattr(features, "feature_curve", None)
        features.main(out, 2)
    finally:
        torch.set_num_threads(threads)
    assert out.read_text() == first
    document = json.loads(first)
    assert document["flows"] == {
        features.PICTURED: "exact flow of the world",
        features.CLIP: "OpenCV DIS, preset medium",
    }
    ddim = document["curves"][features.PICTURED]["ddim"].values()
    assert f"| ddim | {sum(ddim) / 2:.4f} |" in features.table(document)
    assert Image.open(tmp_path / "features-pca.png").size == (128, 7 * (128 + 24))
    assert out.with_suffix(".png").is_file()

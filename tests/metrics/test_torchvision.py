"""Metrics by torchvision's networks, RAFT and LPIPS, and what is said where those are not."""

from __future__ import annotations

import enum
import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from clips import drifting
from torch import nn
from torch.nn.functional import normalize

from stem.metrics import Lpips, UnmeasuredError, estimate_flow, lpips
from stem.metrics.unmeasured import install_torchvision, torchvision_module


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of torch's cache in which weights are looked for."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    folder.mkdir(parents=True)
    return folder


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
    import torchmetrics.functional.image.lpips as functional
    import torchmetrics.image.lpip as modular

    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = alexnet_features()
    weights = SimpleNamespace(DEFAULT=SimpleNamespace(url="https://host/alexnet-owt.pth"))
    stub(
        monkeypatch,
        "torchvision.models",
        AlexNet_Weights=weights,
        alexnet=lambda **_: SimpleNamespace(features=features),
    )
    sys.modules["torchvision"].models = sys.modules["torchvision.models"]
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


def squeezenet_features() -> nn.Sequential:
    """Thirteen layers with the channels of torchvision's `squeezenet1_1().features`, no others."""
    widths = [(0, 3, 64), (3, 64, 128), (6, 128, 256), (9, 256, 384), (10, 384, 384)]
    widths += [(11, 384, 512), (12, 512, 512)]
    layers: list[nn.Module] = [nn.Identity() for _ in range(13)]
    for place, before, after in widths:
        layers[place] = nn.Conv2d(before, after, 1)
    return nn.Sequential(*layers)


def test_lpips_by_squeezenet_is_loaded_once(monkeypatch: pytest.MonkeyPatch, hub: Path) -> None:
    import torchmetrics.functional.image.lpips as functional
    import torchmetrics.image.lpip as modular

    loaded = []

    def squeezenet1_1(**_: Any) -> SimpleNamespace:
        loaded.append(1)
        return SimpleNamespace(features=squeezenet_features())

    weights = SimpleNamespace(DEFAULT=SimpleNamespace(url="https://host/squeezenet1_1.pth"))
    models = "torchvision.models"
    stub(monkeypatch, models, SqueezeNet1_1_Weights=weights, squeezenet1_1=squeezenet1_1)
    sys.modules["torchvision"].models = sys.modules[models]
    for module in (functional, modular):
        monkeypatch.setattr(module, "_TORCHVISION_AVAILABLE", True)
    with pytest.raises(UnmeasuredError) as caught:
        Lpips("squeeze")
    assert "SqueezeNet1_1_Weights.DEFAULT.get_state_dict()" in caught.value.remedy
    (hub / "squeezenet1_1.pth").touch()
    distance = Lpips("squeeze")
    assert distance.variant == "SqueezeNet1_1, version 0.1"
    video = drifting(3, 64)
    # The mean of pairs, and a call leaves nothing to the next one.
    pairs = [distance(video[[k]], video[[k + 1]]) for k in (0, 1)]
    assert min(pairs) > 0
    assert distance(video[:2], video[1:]) == pytest.approx(sum(pairs) / 2, rel=1e-5)
    assert distance(video, video) == 0
    assert loaded == [1]

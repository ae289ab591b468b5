"""HDR pictures made SDR: ITU's own numbers, and what comes out of files."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clips import encode, smooth

from stem.video import VideoError, open_video, read_video
from stem.video.tone_mapping import HLG, PQ, darkened, pq_code, pq_nits, tone_mapped


def grey(*codes: float) -> np.ndarray:
    """Grey pixels side by side, of codes in 0 ... 1."""
    levels = np.rint(65535 * np.array(codes)).astype(np.uint16)
    return np.repeat(levels[None, :, None], 3, axis=2)


def level(nits: float) -> int:
    """The code of a display of BT.1886 whose white has 203 nits."""
    return round(255 * (nits / 203) ** (1 / 2.4))


def test_codes_and_nits_of_the_recommendations() -> None:
    # BT.2408: diffuse white of 203 nits is 58 % of PQ and 75 % of HLG; BT.2100: 1 is 10,000 nits.
    assert pq_code(np.array([0.0, 203.0, 1000.0, 10000.0])) == pytest.approx(
        [0, 0.5807, 0.7518, 1], abs=1e-4
    )
    codes = np.linspace(0.01, 1, 100)
    assert pq_code(pq_nits(codes)) == pytest.approx(codes, abs=1e-9)
    assert np.array_equal(tone_mapped(grey(0.75, 1), HLG), tone_mapped(grey(0.5807, 0.7518), PQ))


def test_the_curve_leaves_the_dark_and_makes_1000_nits_white() -> None:
    # The knee is at 1.5 * 0.7724 - 0.5 = 0.6586 of PQ's code of 1,000 nits: 92 nits.
    nits = np.array([0.0, 10.0, 90.0, 1000.0, 4000.0])
    assert darkened(nits) == pytest.approx([0, 10, 90, 203, 203], abs=0.1)
    # Half way from the knee to the end, t = 1/2: (knee + (1 - knee) / 4 + most) / 2 of the code.
    code = 0.7518 * (0.6586 + 1) / 2
    expected = 0.7518 * (0.6586 + 0.3414 / 4 + 0.7724) / 2
    assert darkened(pq_nits(np.array([code]))) == pytest.approx(pq_nits(expected), rel=1e-3)


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_a_ramp_of_greys_stays_one(transfer: int) -> None:
    found = tone_mapped(grey(*np.linspace(0, 1, 1000)), transfer).astype(int)
    assert np.array_equal(found, found[..., :1].repeat(3, axis=2))
    assert (np.diff(found[0, :, 0]) >= 0).all()
    assert found[0, 0, 0] == 0
    assert found[0, -1, 0] == 255


def test_primaries_become_those_of_bt709() -> None:
    # BT.2087's columns for 50 nits of BT.709's red, green and blue.
    columns = np.array(
        [[0.6274, 0.0691, 0.0164], [0.3293, 0.9195, 0.0880], [0.0433, 0.0114, 0.8956]]
    )
    picture = np.rint(65535 * pq_code(50 * columns)).astype(np.uint16)[None]
    found = tone_mapped(picture, PQ)[0].astype(int)
    assert np.abs(np.diag(found) - level(50)).max() <= 1
    assert (found - np.diag(np.diag(found))).max() <= 12  # near black a level is 1e-5 of white
    blue = np.array([[[0, 0, 65535]]], np.uint16)  # beyond BT.709: clipped, not wrapped around
    assert tone_mapped(blue, PQ)[0, 0].tolist()[0] == 0


def hdr(path: Path, transfer: int, nits: list[float], primaries: int = 9) -> Path:
    """A file of 10 bits, a grey frame for each of the numbers."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace = transfer, primaries, 9
        for index, luminance in enumerate(nits):
            frame = av.VideoFrame(32, 16, "yuv420p10le")
            luma = round(64 + 876 * float(pq_code(np.array(luminance))))
            for plane, value in zip(frame.planes, (luma, 512, 512), strict=True):
                plane.update(np.full(plane.buffer_size // 2, value, np.uint16).tobytes())
            frame.pts, frame.time_base = index, Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_a_file_is_mapped_where_it_is_asked_for(tmp_path: Path) -> None:
    path = hdr(tmp_path / "clip.mkv", PQ, [10, 50, 90, 1000])
    video = read_video(path, tone_map=True, size=16)
    assert video.notes[-1] == (
        "the pictures are HDR (PQ) and were tone-mapped to SDR (BT.2390, 1000 nits to white)"
    )
    expected = torch.tensor([level(10), level(50), level(90), 255])
    assert (video.frames.int() - expected.view(4, 1, 1, 1)).abs().max() <= 2  # of 876 levels
    opened = open_video(path, tone_map=True, size=16)
    assert torch.equal(torch.cat(list(opened.parts(3))), video.frames)
    assert opened.notes == video.notes
    plain = read_video(path)
    assert int(plain.frames[3].max()) < 200
    assert "pass tone_map=True (--tone-map)" in plain.notes[0]


def test_what_is_not_hdr_stays_as_it_is(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mkv", smooth(2))
    video = read_video(path, tone_map=True)
    assert torch.equal(video.frames, read_video(path).frames)
    assert video.notes == ("the pictures are neither PQ nor HLG, and were not tone-mapped",)


def test_hdr_of_other_primaries_is_refused(tmp_path: Path) -> None:
    path = hdr(tmp_path / "clip.mkv", PQ, [10], primaries=12)
    with pytest.raises(VideoError, match="is HDR in the colours of Display P3, and tone mapping"):
        read_video(path, tone_map=True)

"""Which of a file's streams is the video, and what it states of its rate and its colours."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from av.container import InputContainer
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from .frames import VideoError
from .tone_mapping import HLG, PEAK, PQ

_NO_TIMESTAMPS = 0x80  # AVFMT_NOTIMESTAMPS
_HDR = {PQ: "PQ", HLG: "HLG"}
_BT2020 = 9
_WIDE = {_BT2020: "BT.2020", 11: "DCI-P3", 12: "Display P3"}  # AVCOL_PRI_*, wider than BT.709's
_TO_BT709 = "zscale=p=bt709:t=bt709:m=bt709:r=tv,format=yuv420p"


def video_stream(container: InputContainer, path: Path, notes: list[str]) -> VideoStream:
    """The stream that FFmpeg prefers among those that are no attached picture, such as a cover.

    Args:
        container: Container of an open file.
        path: File that it is, for errors.
        notes: Notes of the reading; where others are left out, one is added.

    Raises:
        VideoError: there is no such stream, or no decoder for it.
    """
    streams = container.streams.video
    if not streams:
        raise VideoError(f"{path}: has no video stream; use a file with pictures in it")
    films = [each for each in streams if not each.disposition & Disposition.attached_pic]
    if not films:
        raise VideoError(
            f"{path}: has a cover picture, and no video stream beside it; use a file with a video"
        )
    best = container.streams.best("video")
    chosen = next((each for each in films if best and each.index == best.index), films[0])
    if chosen.codec_context is None:
        raise VideoError(f"{path}: this FFmpeg has no decoder for its codec; convert it to H.264")
    if len(films) > 1:
        others = ", ".join(str(each.index) for each in films if each is not chosen)
        notes.append(
            f"of {len(films)} video streams number {chosen.index} was read, which FFmpeg prefers, "
            f"and not {others}"
        )
    return chosen


def holds_times(container: InputContainer) -> bool:
    """Whether the file says when its frames come; pictures and bare streams of a codec do not."""
    name = container.format.name
    bare = bool(container.format.flags & _NO_TIMESTAMPS)
    return not (bare or name == "image2" or name.endswith("_pipe"))


def frame_rate(
    container: InputContainer, stream: VideoStream, path: Path, notes: list[str]
) -> Fraction:
    """Frames per second as the file states them.

    Args:
        container: Container of an open file.
        stream: Stream of it.
        path: File that it is, for errors.
        notes: Notes of the reading; where FFmpeg's default is taken, one is added.

    Raises:
        VideoError: the file states no rate, and there is no default.
    """
    if holds_times(container):
        rate = stream.average_rate or stream.guessed_rate
    else:  # what FFmpeg gives as the stream's rates is its own default, unless the codec states one
        rate = stream.codec_context.framerate
        if not rate and (rate := stream.average_rate):
            notes.append(
                f"the file states no frame rate, and its frames were taken as {float(rate):.5g} a "
                "second, FFmpeg's default"
            )
    if not rate:
        raise VideoError(f"{path}: states no frame rate; convert it with an explicit one")
    return rate


def hdr_transfer(context: VideoCodecContext, path: Path) -> int | None:
    """The transfer of HDR pictures that are to be tone-mapped; None of SDR ones.

    Args:
        context: Context of a stream of which a frame has been decoded.
        path: File that it is, for errors.

    Raises:
        VideoError: the pictures are HDR of other primaries than BT.2020's.
    """
    if context.color_trc not in _HDR:
        return None
    if context.color_primaries in _WIDE.keys() - {_BT2020}:
        raise VideoError(
            f"{path}: is HDR in the colours of {_WIDE[context.color_primaries]}, and tone mapping "
            "is for those of BT.2020; convert it first, or leave it as it is"
        )
    return context.color_trc


def colour_notes(context: VideoCodecContext, *, tone_map: bool) -> Iterator[str]:
    """Say so where colours are of another kind than the pictures that are made of them.

    Args:
        context: Context of a stream of which a frame has been decoded.
        tone_map: Whether HDR pictures are tone-mapped.
    """
    name = _HDR.get(context.color_trc)
    if tone_map:
        yield (
            f"the pictures are HDR ({name}) and were tone-mapped to SDR (BT.2390, {PEAK:.0f} nits "
            "to white)"
            if name
            else "the pictures are neither PQ nor HLG, and were not tone-mapped"
        )
    if name:
        if not tone_map:
            yield (
                f"the pictures are HDR ({name}) and were read as if they were SDR, which makes "
                "them pale; to have them right, pass tone_map=True (--tone-map)"
            )
    elif context.color_primaries in _WIDE:
        yield (
            f"the colours are of {_WIDE[context.color_primaries]} and were read as if they were of "
            "BT.709, which makes them pale; to have them right, first run ffmpeg -i FILE -vf "
            f"{_TO_BT709} bt709.mp4"
        )

"""HDR pictures made into SDR ones: PQ and HLG into BT.709's colours, by ITU's recommendations.

Codes become nits of a display (BT.2100), as of 1,000 nits at HLG. Each pixel is darkened until its
brightest channel is within 203 nits, HDR's reference white (BT.2408), by the curve of BT.2390 5.4.1
for a picture of up to PEAK nits: below 92 nits nothing changes, and PEAK becomes white. Then come
BT.709's primaries (BT.2087) and the display gamma of BT.1886.
"""

from __future__ import annotations

import functools

import numpy as np

PQ, HLG = 16, 18
"""AVCOL_TRC_SMPTE2084 and AVCOL_TRC_ARIB_STD_B67."""
PEAK = 1000.0
"""Nits of the brightest highlight: what most HDR is graded for, and HLG's nominal display."""
WHITE = 203.0
GAMMA = 2.4
_HLG_GAMMA = 1.2  # of the system, for a display of 1,000 nits
_M1, _M2 = 2610 / 16384, 2523 / 4096 * 128
_C1, _C2, _C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)
_TO_BT709 = np.array(  # rows of a sum of 1, so that grey stays grey
    [
        [1.6604910, -0.5876411, -0.0728499],
        [-0.1245505, 1.1328999, -0.0083494],
        [-0.0181508, -0.1005789, 1.1187297],
    ],
    np.float32,
)


def tone_mapped(picture: np.ndarray, transfer: int) -> np.ndarray:
    """An HDR picture in BT.2020's colours as an SDR one in BT.709's.

    Args:
        picture: Codes, uint16 [H, W, 3], of which 65535 is 1.
        transfer: Transfer that the codes are of, PQ or HLG.

    Returns:
        uint8 [H, W, 3], RGB.
    """
    nits = _curve(transfer)[picture]
    if transfer == HLG:  # the curve gave light of the scene
        nits *= PEAK * (nits @ _LUMINANCE)[..., None] ** (_HLG_GAMMA - 1)
    peak = nits.max(axis=-1, keepdims=True)
    nits *= darkened(peak) / np.maximum(peak, 1e-6)
    linear = np.clip(nits @ (_TO_BT709.T / WHITE), 0, 1)
    return np.rint(255 * linear ** (1 / GAMMA)).astype(np.uint8)


def darkened(nits: np.ndarray) -> np.ndarray:
    """What the curve of BT.2390 makes of nits: PEAK and all above become WHITE."""
    top = pq_code(np.array(PEAK, np.float32))
    codes = np.minimum(pq_code(nits) / top, 1)
    most = pq_code(np.array(WHITE, np.float32)) / top
    knee = 1.5 * most - 0.5
    t = np.maximum((codes - knee) / (1 - knee), 0)
    spline = (
        (2 * t**3 - 3 * t**2 + 1) * knee
        + (t**3 - 2 * t**2 + t) * (1 - knee)
        + (3 * t**2 - 2 * t**3) * most
    )
    return np.where(codes < knee, nits, pq_nits(spline * top))


def pq_nits(codes: np.ndarray) -> np.ndarray:
    """Nits of PQ's codes in 0 ... 1 (BT.2100, table 4)."""
    power = codes ** (1 / _M2)
    return 10000 * (np.maximum(power - _C1, 0) / (_C2 - _C3 * power)) ** (1 / _M1)


def pq_code(nits: np.ndarray) -> np.ndarray:
    """PQ's codes in 0 ... 1 of nits; the inverse of `pq_nits`."""
    power = (nits / 10000) ** _M1
    return ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2


@functools.cache
def _curve(transfer: int) -> np.ndarray:
    """Nits of all codes of PQ, float32 [65536]; of HLG light of the scene in 0 ... 1."""
    codes = np.arange(65536) / 65535
    if transfer == PQ:
        return pq_nits(codes).astype(np.float32)
    a = 0.17883277
    b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)
    light = np.where(codes <= 0.5, codes**2 / 3, (np.exp((codes - c) / a) + b) / 12)
    return light.astype(np.float32)

"""Colours of other people's pictures -> sRGB on white, which is what all frames here are.

A picture states its colours by an ICC profile, by codes of ITU-T H.273 (of primaries and transfer),
or by numbers of its format's own. What states nothing is taken as sRGB.
"""

import io
import struct
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageCms


class Primaries(NamedTuple):
    """Chromaticities (x, y)."""

    red: tuple[float, float]
    green: tuple[float, float]
    blue: tuple[float, float]
    white: tuple[float, float] = (0.3127, 0.3290)  # D65


SRGB = Primaries((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
ADOBE_RGB = SRGB._replace(green=(0.210, 0.710))
DISPLAY_P3 = Primaries((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
DCI_P3 = DISPLAY_P3._replace(white=(0.314, 0.351))
BT2020 = Primaries((0.708, 0.292), (0.170, 0.797), (0.131, 0.046))

# Codes of H.273. Older television's primaries are so near to sRGB's that players take them as such.
WIDE = {9: BT2020, 11: DCI_P3, 12: DISPLAY_P3}
LINEAR = 8
NOT_READ = {  # transfers
    **{9: "logarithmic", 10: "logarithmic", 16: "HDR (PQ)", 17: "of cinema (DCI)"},
    18: "HDR (HLG)",
}
XYZ = 10  # primaries that are none
MATRICES_NOT_READ = {8: "YCgCo", 10: "BT.2020 of constant luminance", 11: "YDzDx", 14: "ICtCp"}


def on_white(image: Image.Image, alpha: Image.Image) -> Image.Image:
    """An RGB image blended with white: what alpha (mode L) hides is hidden."""
    white = Image.new("RGB", image.size, "white")
    return Image.composite(image, white, alpha)


# -------------------------------------------------------------------------------------- by numbers


def from_codes(rgb: np.ndarray, primaries: int, transfer: int) -> np.ndarray:
    """uint8 [..., 3] of these codes -> sRGB. ValueError for HDR."""
    if transfer in NOT_READ or primaries == XYZ:
        kind = NOT_READ.get(transfer, "CIE XYZ")
        raise ValueError(f"it is {kind}, which is not read; convert it to SDR (BT.709) first")
    if transfer == LINEAR:
        return from_primaries(rgb, WIDE.get(primaries, SRGB), gamma=1.0)
    if primaries in WIDE:
        return from_primaries(rgb, WIDE[primaries])
    return rgb


def from_primaries(rgb: np.ndarray, primaries: Primaries, gamma: float | None = None) -> np.ndarray:
    """uint8 [..., 3] of these chromaticities -> sRGB; what sRGB can't show is clipped.

    gamma: light is level**gamma; None for sRGB's own curve.
    """
    level = np.arange(256, dtype=np.float32) / 255
    if gamma is None:
        curved = ((level + 0.055) / 1.055) ** 2.4
        light = np.where(level <= 0.04045, level / 12.92, curved)
    else:
        light = level**gamma

    matrix = np.linalg.inv(_to_xyz(SRGB)) @ _to_xyz(primaries)
    matrix /= matrix.sum(1, keepdims=True)  # white stays white
    linear = light[rgb] @ matrix.T.astype(np.float32)
    linear = linear.clip(0, 1)

    curved = 1.055 * linear ** (1 / 2.4) - 0.055
    level = np.where(linear <= 0.0031308, 12.92 * linear, curved)
    return (255 * level).round().astype(np.uint8)


def _to_xyz(primaries: Primaries) -> np.ndarray:
    """The matrix [3, 3] from linear RGB to CIE XYZ."""
    columns = []
    for x, y in primaries:
        columns.append((x / y, 1, (1 - x - y) / y))
    *colours, white = np.array(columns)
    matrix = np.stack(colours, axis=1)
    return matrix * np.linalg.solve(matrix, white)  # each as bright as white needs it


# ------------------------------------------------------------------------------------------ stills


def still(image: Image.Image, codes: tuple[int, int] | None, path: str | Path) -> Image.Image:
    """A Pillow image of mode L, RGB or CMYK, with its `info` -> RGB in sRGB. `codes` come first."""
    profile = image.info.get("icc_profile")
    if profile and not codes:
        return _from_profile(image, profile, path)

    rgb = image.convert("RGB")
    if codes:
        return Image.fromarray(from_codes(np.asarray(rgb), *codes))
    primaries, gamma = _stated_numbers(image)
    if (primaries, gamma) == (SRGB, None):
        return rgb
    return Image.fromarray(from_primaries(np.asarray(rgb), primaries, gamma))


def _from_profile(image: Image.Image, content: bytes, path: str | Path) -> Image.Image:
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        if image.mode == "L" and profile.profile.xcolor_space.strip() == "RGB":
            image = image.convert("RGB")
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
    except (OSError, ImageCms.PyCMSError):
        print(f"note: the colour profile of {path} does not fit: taken as sRGB", file=sys.stderr)
        return image.convert("RGB")


def _stated_numbers(image: Image.Image) -> tuple[Primaries, float | None]:
    """Primaries and gamma (None: sRGB's curve) of a PNG or by the EXIF."""
    # A camera that is set to Adobe RGB says so in the EXIF only.
    exif = image.getexif()
    settings = exif.get_ifd(ExifTags.IFD.Exif)
    is_adobe = settings.get(ExifTags.Base.ColorSpace) == 2
    if ExifTags.IFD.Interop in settings:
        interoperability = exif.get_ifd(ExifTags.IFD.Interop)
        is_adobe = is_adobe or interoperability.get(ExifTags.Interop.InteropIndex) == "R03"
    if is_adobe:
        return ADOBE_RGB, 2.2

    # PNG's gAMA is the exponent of writing. Nearly all say 1 / 2.2, and mean sRGB's curve.
    written = image.info.get("gamma", 0)
    if written <= 0 or "srgb" in image.info:
        return SRGB, None
    gamma = 1 / written
    if abs(gamma - 2.2) < 0.05:
        gamma = None

    # Its cHRM, if that makes sense.
    numbers = image.info.get("chromaticity", (0,))
    if min(numbers) <= 0:
        return SRGB, gamma
    white, *colours = zip(numbers[::2], numbers[1::2], strict=True)
    primaries = Primaries(*colours, white)
    if np.abs(np.subtract(primaries, SRGB)).max() < 0.01:
        return SRGB, gamma
    return primaries, gamma


def stated_codes(path: str | Path, kind: str) -> tuple[int, int] | None:
    """The codes of primaries and transfer that a PNG or AVIF file states, which Pillow drops."""
    if kind not in ("PNG", "AVIF"):
        return None
    with open(path, "rb") as file:
        head = file.read(1 << 20)

    if kind == "AVIF":
        # A profile, which may stand beside, says it better.
        at = head.find(b"colrnclx")
        if at < 0 or b"colrprof" in head:
            return None
        return struct.unpack_from(">HH", head, at + 8)

    at = 8
    while True:
        name = head[at + 4 : at + 8]
        if name == b"cICP":
            if head[at + 11 : at + 12] == b"\0":
                raise ValueError("its levels are of the limited range; convert it to the full one")
            return head[at + 8], head[at + 9]
        if name in (b"", b"IDAT"):
            return None
        at += 12 + int.from_bytes(head[at : at + 4], "big")

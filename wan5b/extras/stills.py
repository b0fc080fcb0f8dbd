"""Image files as people see them: upright, in sRGB, on white. Pillow reads them."""

import sys
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from wan5b.extras import colour
from wan5b.util import first_line, raise_interrupted

# Pillow's formats that are not read: EPS runs a program, WMF needs Windows, MPEG is no image, and
# the others are only recognized.
LEFT_OUT = {"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"}


def read_still(path: str | Path) -> np.ndarray | None:
    """An image file as uint8 [H, W, 3], of an animation the first frame; None if it is no image.

    Raises whatever Pillow raises if it is damaged.
    """
    Image.init()
    formats = [name for name in Image.OPEN if name not in LEFT_OUT]
    try:
        with Image.open(path, formats=formats) as image:
            if image.format == "PNG":
                image.verify()  # the checksums, which are not looked at otherwise
    except UnidentifiedImageError:
        return None

    with Image.open(path, formats=formats) as image:
        if image.format == "TIFF":
            _refuse_previews(image)
        if image.format == "AVIF":
            _refuse_crops(path)
        _drop_damaged_exif(image, path)
        codes = colour.stated_codes(path, image.format)
        ends = _gray_ends(image)
        upright = ImageOps.exif_transpose(image)
        opaque, alpha = _without_alpha(upright, *ends)
        rgb = colour.still(opaque, codes, path)
        if alpha is not None:
            rgb = colour.on_white(rgb, alpha)
        return np.asarray(rgb)


def _refuse_previews(image: Image.Image) -> None:
    """Raw files of cameras are TIFFs, of which Pillow would read a small preview."""
    reduced = image.tag_v2.get(ExifTags.Base.NewSubfileType, 0) & 1
    if reduced or ExifTags.Base.DNGVersion in image.tag_v2:
        raise ValueError("it is a camera's raw file; develop it, to PNG or JPEG")


def _refuse_crops(path: str | Path) -> None:
    """What an AVIF's header cuts away Pillow leaves there."""
    with open(path, "rb") as file:
        header = file.read(1 << 20).partition(b"mdat")[0]
    if b"clap" in header:
        raise ValueError("its header crops it (clap), which is not read; save it as JPEG or PNG")


def _drop_damaged_exif(image: Image.Image, path: str | Path) -> None:
    try:
        exif = Image.Exif()
        exif.load(image.info.get("exif", b""))
        if ExifTags.IFD.Interop in exif.get_ifd(ExifTags.IFD.Exif):
            exif.get_ifd(ExifTags.IFD.Interop)
    except Exception as error:  # a foreign reader
        raise_interrupted(error)
        print(f"note: the EXIF of {path} is left out: {first_line(error)}", file=sys.stderr)
        image.info.pop("exif", None)


def _gray_ends(image: Image.Image) -> tuple[int, int]:
    """The levels of black and of white in gray of more than 8 bits, as Pillow reads them."""
    if image.format != "TIFF":
        return 0, 65535
    bits = image.tag_v2.get(ExifTags.Base.BitsPerSample)
    if bits == (16,) and image.tag_v2.get(ExifTags.Base.SampleFormat) == (2,):
        raise ValueError("its levels are signed, of unknown range; convert it to unsigned ones")
    if bits == (32,) and image.mode == "I":
        raise ValueError("its levels have 32 bits, of unknown range; convert it to 8 or 16 bits")
    white = 4095 if bits == (12,) else 65535
    is_negative = image.tag_v2.get(ExifTags.Base.PhotometricInterpretation) == 0
    return (white, 0) if is_negative else (0, white)


def _without_alpha(
    image: Image.Image, black: int, white: int
) -> tuple[Image.Image, Image.Image | None]:
    """An image of any mode as one of mode L, RGB or CMYK, and its alpha (mode L) if it has any.

    black, white: see `_gray_ends`.
    """
    if image.mode.startswith("I"):
        return _from_16_bits(image, black, white)
    if image.mode == "F":
        raise ValueError("its levels are floats, of unknown range; convert it to 8 or 16 bits")

    alpha = None
    gray = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        alpha = rgba.getchannel("A")
        if not gray:
            image = rgba
    if image.mode == "CMYK":
        return image, alpha
    return image.convert("L" if gray else "RGB"), alpha


def _from_16_bits(
    image: Image.Image, black: int, white: int
) -> tuple[Image.Image, Image.Image | None]:
    """Gray of 12 or 16 bits, which Pillow would clip at 255."""
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise ValueError(
            f"its levels are {levels.min()} to {levels.max()}; gray is read from 0 to 65535"
        )
    shares = (levels - black) / (white - black)
    gray = Image.fromarray((255 * shares).round().astype(np.uint8))
    gray.info = image.info.copy()

    key = gray.info.pop("transparency", None)  # the level that is not seen
    if key is None:
        return gray, None
    return gray, Image.fromarray(np.where(levels == key, 0, 255).astype(np.uint8))

"""Images and videos of strange origin: read as viewers and players show them, or one clear line."""

import io
import os
import socket
import struct
import threading
import tracemalloc
import wave
from fractions import Fraction
from itertools import islice

import av
import numpy as np
import odd_files
import pytest
from odd_files import (
    QUIET,
    colours,
    corners,
    indices,
    named,
    numbered,
    picture,
    png_chunk,
    turn,
    write_video,
)
from PIL import Image, ImageCms, ImageOps

from wan5b.extras import colour, pictures, videos
from wan5b.extras.pictures import read_clips, read_image, read_video
from wan5b.extras.videos import Shown

MAGENTA = (255, 0, 255)


def first_clip(path, frames=2, fps=24):
    return next(read_clips(path, frames, fps))


READERS = [read_image, read_video, first_clip]


# ------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("a.png", picture()),
        ("a.png", picture().convert("L")),
        ("a.png", picture().convert("1")),
        ("a.png", picture().quantize(16)),
        ("a.tif", picture()),
        ("a.tif", picture().convert("YCbCr")),
        ("a.bmp", picture()),
        ("a.gif", picture().quantize(16)),
        ("a.webp", picture()),
        ("a.jpg", picture().convert("CMYK")),
        ("a.jpg", picture(31, 17)),
        ("a.avif", picture()),
    ],
    ids=lambda value: value if isinstance(value, str) else value.mode,
)
def test_image_formats(tmp_path, name, image):
    image.save(tmp_path / name, quality=95, lossless=True)
    pixels = read_image(tmp_path / name)
    expected = np.asarray(image.convert("RGB"))[None]
    assert pixels.dtype == np.uint8
    assert pixels.shape == expected.shape
    bar = 6 if name in ("a.jpg", "a.avif") else 0
    assert np.abs(pixels.astype(int) - expected).mean() <= bar


def cut_out():
    """A square, around which everything is hidden."""
    levels = np.zeros((32, 64, 4), np.uint8)
    levels[..., :3] = MAGENTA
    levels[8:24, 16:48] = (200, 120, 90, 255)
    return Image.fromarray(levels)


def gray_16():
    return Image.fromarray(np.linspace(0, 65535, 30 * 50).reshape(30, 50).astype(np.uint16))


HIDDEN = {
    "rgba.png": (cut_out(), {}),
    "rgba.webp": (cut_out(), {"lossless": True, "exact": True}),
    "rgba.tif": (cut_out(), {}),
    "rgba.tga": (cut_out(), {}),
    "rgba.avif": (cut_out(), {}),
    "rgba.jp2": (cut_out(), {}),
    "rgba.ico": (cut_out(), {}),
    "gray.png": (cut_out().convert("LA"), {}),
    "palette.png": (cut_out().quantize(8), {}),
    "palette.gif": (cut_out(), {}),
    "key.png": (Image.new("RGB", (64, 32), MAGENTA), {"transparency": MAGENTA}),
    "gray_key.png": (Image.new("L", (64, 32), 90), {"transparency": 90}),
    "palette_key.png": (Image.new("RGB", (64, 32), MAGENTA).quantize(4), {"transparency": 0}),
    "bit_key.png": (Image.new("1", (64, 32), 0), {"transparency": 0}),
    "gray_16_key.png": (gray_16(), {"transparency": 0}),
    "white_16_key.png": (Image.new("I;16", (64, 32), 300), {"transparency": 300}),
    "profile.png": (cut_out(), {"icc_profile": odd_files.profile()}),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_is_transparent_is_white(tmp_path, name):
    image, options = HIDDEN[name]
    image.save(tmp_path / name, **options)
    assert (read_image(tmp_path / name)[0, 0, 0] == 255).all()


def test_alpha_blends_with_white(tmp_path):
    Image.new("RGBA", (8, 8), (200, 100, 0, 51)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0, 0, 0].tolist() == [244, 224, 204]  # a fifth of it
    cut_out().save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0, 16, 32].tolist() == [200, 120, 90]


def test_16_bit_images_keep_their_range(tmp_path):
    for name in ("a.png", "a.tif"):
        gray_16().save(tmp_path / name)
        pixels = read_image(tmp_path / name)[0]
        assert (pixels.min(), pixels.max()) == (0, 255)
        assert np.abs(pixels - np.asarray(gray_16())[..., None] / 257).max() <= 0.5


def test_first_frame_of_an_animation(tmp_path):
    first = picture(seed=1).quantize(64)
    second = picture(seed=2).quantize(64)
    for name in ("a.gif", "a.png", "a.webp"):
        first.save(tmp_path / name, save_all=True, append_images=[second], lossless=True)
        expected = np.asarray(first.convert("RGB"))
        assert np.array_equal(read_image(tmp_path / name)[0], expected)


def test_first_frame_of_a_video(tmp_path):
    write_video(tmp_path / "a.mp4", np.stack([corners(), 255 - corners()]))
    pixels = read_image(tmp_path / "a.mp4")
    assert np.array_equal(pixels, read_video(tmp_path / "a.mp4")[:1])


@pytest.mark.parametrize(
    "name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.avif", "gray.jpg", "16.png"]
)
def test_photographs_are_upright(tmp_path, name):
    image = {"gray.jpg": Image.fromarray(corners()).convert("L"), "16.png": gray_16()}
    image = image.get(name, Image.fromarray(corners()))
    shown = {1: "rgbk", 2: "grkb", 3: "kbgr", 4: "bkrg", 5: "rbgk", 6: "brkg", 7: "kgbr", 8: "gkrb"}
    for orientation, expected in shown.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(tmp_path / name, exif=exif)
        pixels = read_image(tmp_path / name)[0]
        if image.mode == "RGB":
            assert named(pixels) == expected
        with Image.open(tmp_path / name) as stored:
            upright = ImageOps.exif_transpose(stored)
            assert pixels.shape == (*upright.size[::-1], 3)
            if image.mode == "L":
                assert np.array_equal(pixels, np.asarray(upright.convert("RGB")))


def test_damaged_exif_is_left_out(tmp_path, capsys):
    for name in ("a.jpg", "a.png", "a.webp"):
        picture().save(tmp_path / name, exif=b"Exif\0\0garbage")
        assert read_image(tmp_path / name).shape == (1, 30, 50, 3)
        assert f"note: the EXIF of {tmp_path / name} is left out" in capsys.readouterr().err


# -------------------------------------------------------------------------------- colours of images

GREEN = (60, 200, 60)
P3_GREEN = (
    0,
    205,
    0,
)  # the same numbers in Display P3 are this in sRGB, by littlecms, at gamma 2.2
P3_CURVED = (0, 203, 11)  # and at sRGB's own curve


@pytest.mark.parametrize(
    "name", ["a.png", "a.jpg", "a.webp", "a.tif", "a.avif", "palette.png", "alpha.png"]
)
def test_profiles_are_converted(tmp_path, name):
    image = Image.new("RGB", (64, 32), GREEN)
    if name == "palette.png":
        image = image.quantize(4)
    if name == "alpha.png":
        image.putalpha(255)
    image.save(tmp_path / name, icc_profile=odd_files.profile(), quality=95, lossless=True)
    assert np.abs(read_image(tmp_path / name)[0, 9, 9] - np.array(P3_GREEN)).max() <= 4


def test_a_profile_is_converted_as_littlecms_does(tmp_path):
    picture().save(tmp_path / "a.png", icc_profile=odd_files.profile())
    stated = ImageCms.ImageCmsProfile(io.BytesIO(odd_files.profile()))
    srgb = ImageCms.createProfile("sRGB")
    expected = ImageCms.profileToProfile(picture(), stated, srgb)
    assert np.array_equal(read_image(tmp_path / "a.png")[0], np.asarray(expected))


@pytest.mark.parametrize("content", [b"no profile", odd_files.profile()[:200]])
def test_a_damaged_profile_is_left_out(tmp_path, capsys, content):
    picture().save(tmp_path / "a.png", icc_profile=content)
    assert np.array_equal(read_image(tmp_path / "a.png")[0], np.asarray(picture()))
    assert f"note: the colour profile of {tmp_path / 'a.png'} does not" in capsys.readouterr().err


def test_a_gray_image_with_a_colour_profile(tmp_path):
    Image.new("L", (8, 8), 120).save(tmp_path / "a.jpg", icc_profile=odd_files.profile())
    assert np.abs(read_image(tmp_path / "a.jpg").astype(int) - 120).max() <= 3


def png_with(*chunks):
    def make(path):
        Image.new("RGB", (64, 32), GREEN).save(path)
        for name, content in chunks:
            png_chunk(path, name, content)

    return make


def chromaticities(*numbers):
    return b"cHRM", struct.pack(">8I", *(round(100000 * number) for number in numbers))


def adobe_photograph(path):
    exif = Image.Exif()
    exif[0x0112] = 1
    exif.get_ifd(0x8769)[0xA001] = 0xFFFF
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    Image.new("RGB", (64, 32), GREEN).save(path, exif=exif)


P3_CHUNK = chromaticities(0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06)
SRGB_CHUNK = chromaticities(0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (png_with((b"cICP", bytes([12, 13, 0, 1]))), P3_CURVED),
        (png_with((b"cICP", bytes([1, 13, 0, 1]))), GREEN),
        (png_with((b"gAMA", struct.pack(">I", 45455))), GREEN),
        (png_with((b"gAMA", struct.pack(">I", 100000))), (133, 229, 133)),  # light itself
        (png_with((b"gAMA", struct.pack(">I", 45455)), P3_CHUNK), P3_CURVED),
        (png_with((b"gAMA", struct.pack(">I", 45455)), SRGB_CHUNK), GREEN),
        (png_with((b"gAMA", struct.pack(">I", 100000)), (b"sRGB", b"\0")), GREEN),
        (png_with(P3_CHUNK), GREEN),  # says nothing without gAMA
        (png_with((b"gAMA", struct.pack(">I", 45455)), chromaticities(*[0] * 8)), GREEN),
        (adobe_photograph, (0, 201, 37)),
    ],
)
def test_numbers_are_converted(tmp_path, make, expected):
    make(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png")
    assert np.abs(pixels[0, 9, 9] - np.array(expected)).max() <= 3


def avif(path, primaries=1, transfer=13):
    Image.new("RGB", (64, 32), GREEN).save(path, quality=100)
    stated = struct.pack(">HH", primaries, transfer)
    content = path.read_bytes()
    at = content.index(b"colrnclx") + 8
    path.write_bytes(content[:at] + stated + content[at + 4 :])


def test_codes_of_avif_are_converted(tmp_path):
    avif(tmp_path / "a.avif", 12)
    assert np.abs(read_image(tmp_path / "a.avif")[0, 9, 9] - np.array(P3_CURVED)).max() <= 8


def test_primaries_are_converted_as_by_littlecms():
    stated = ImageCms.ImageCmsProfile(io.BytesIO(odd_files.profile()))
    expected = ImageCms.profileToProfile(picture(), stated, ImageCms.createProfile("sRGB"))
    found = colour.from_primaries(np.asarray(picture()), colour.DISPLAY_P3, gamma=2.2)
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 2
    same = colour.from_primaries(np.asarray(picture()), colour.SRGB)
    assert np.array_equal(same, np.asarray(picture()))


# ----------------------------------------------------------------------------------- images refused


def box(kind, *parts):
    content = b"".join(parts)
    return struct.pack(">I", 8 + len(content)) + kind + content


def heic(path):
    """Of tiles, as phones write it: FFmpeg would read the first."""
    header = box(b"meta", bytes(4), box(b"hdlr", bytes(8), b"pict", bytes(13)))
    path.write_bytes(box(b"ftyp", b"heic\0\0\0\0mif1heic") + header + box(b"mdat", bytes(99)))


def cropped_avif(path):
    """Pillow's, with one property more."""
    picture(64, 96).save(path)
    content = bytearray(path.read_bytes())

    def number(at):
        return int.from_bytes(content[at : at + 4], "big")

    def grow(at, length):
        content[at : at + 4] = struct.pack(">I", number(at) + length)

    crop = box(b"clap", struct.pack(">8I", 48, 1, 32, 1, 0, 1, 0, 1))
    properties = content.index(b"ipco") - 4
    end = properties + number(properties)
    count = 0
    at = properties + 8
    while at < end:
        at += number(at)
        count += 1

    owned = content.index(b"ipma") + 14  # how many the picture has, and their numbers
    content.insert(owned + 1 + content[owned], 0x80 | count + 1)
    content[owned] += 1
    content[end:end] = crop
    grow(content.index(b"iloc") + 18, 41)  # where the picture starts
    for kind, length in ((b"ipco", 40), (b"ipma", 1), (b"iprp", 41), (b"meta", 41)):
        grow(content.index(kind) - 4, length)
    path.write_bytes(content)
    assert Image.open(path).size == (96, 64)  # Pillow minds it not


def huge(path):
    """A photograph of 200 megapixels."""
    Image.new("1", (20000, 10000)).save(path)


def raw(path, **tags):
    picture().save(path, tiffinfo=tags)


def pages_of_floats(path):
    Image.fromarray(np.full((9, 9), 0.5, np.float32)).save(path)


def levels_of_32_bits(path):
    Image.fromarray(np.full((9, 9), 200, np.int32)).save(path)  # white in 8 bits, black in 16


REFUSED = {
    "a.heic": (heic, "HEIC .*save it as JPEG or PNG"),
    "renamed.jpg": (heic, "HEIC .*save it as JPEG or PNG"),
    "crop.avif": (cropped_avif, "header crops it .*save it as JPEG or PNG"),
    "pq.avif": (lambda path: avif(path, 9, 16), r"HDR \(PQ\), .* convert it to SDR"),
    "pq.png": (png_with((b"cICP", bytes([9, 16, 0, 1]))), r"HDR \(PQ\), .* convert it to SDR"),
    "hlg.png": (png_with((b"cICP", bytes([9, 18, 0, 1]))), r"HDR \(HLG\), .* convert it to SDR"),
    "preview.dng": (lambda path: picture().save(path, "TIFF", tiffinfo={254: 1}), "raw file"),
    "float.tif": (pages_of_floats, "floats, .* convert it to 8 or 16 bits"),
    "deep.tif": (levels_of_32_bits, "levels have 32 bits, .* convert it to 8 or 16"),
    "program.eps": (lambda path: picture().save(path), "no format that is read"),
    "paper.pdf": (lambda path: picture().save(path), "no format that is read"),
    "huge.png": (huge, "exceeds limit"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_images(tmp_path, name):
    make, reason = REFUSED[name]
    make(tmp_path / name)
    with pytest.raises(ValueError, match=f"cannot read the image .*{name}: .*({reason})"):
        read_image(tmp_path / name)


@pytest.mark.parametrize(
    "kind",
    ["png", "gif", "jpg", "webp", "avif", "tif", "bmp", "tga", "dds", "jp2", "pcx", "ico", "ppm"],
)
def test_damaged_images(tmp_path, kind):
    """Cut anywhere it is a clear line, or nothing is missing."""
    whole = tmp_path / f"whole.{kind}"
    picture().save(whole)
    content = whole.read_bytes()
    expected = read_image(whole)
    path = tmp_path / f"cut.{kind}"
    for length in (0, 1, 2, 4, 6, 8, 12, 20, 60, 91, len(content) // 2, len(content) * 9 // 10):
        path.write_bytes(content[:length])
        says = ""
        pixels = expected
        try:
            pixels = read_image(path)
        except ValueError as error:
            says = str(error)
        assert not says or (says.startswith(f"cannot read the image {path}: ") and "\n" not in says)
        assert np.array_equal(pixels, expected)


def test_checksums_of_png_are_looked_at(tmp_path):
    picture().save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)  # an unfinished download
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="cannot read the image .*a.png"):
        read_image(tmp_path / "a.png")


# ------------------------------------------------------------------------------- geometry of videos


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((1, 0, 0, 1), "rgbk"),
        ((0, 1, -1, 0), "brkg"),
        ((-1, 0, 0, -1), "kbgr"),
        ((0, -1, 1, 0), "gkrb"),
        ((-1, 0, 0, 1), "grkb"),
        ((1, 0, 0, -1), "bkrg"),
        ((0, 1, 1, 0), "rbgk"),
        ((0, -1, -1, 0), "kgbr"),
        ((0, 0, 0, 0), "rgbk"),
    ],
)
def test_videos_are_upright(tmp_path, matrix, expected):
    """A phone's or a mirror's, which tells by a matrix in its header how to show the pictures."""
    path = write_video(tmp_path / "a.mp4", np.stack([corners()] * 3))
    turn(path, matrix)
    for read in READERS:
        frame = read(path)[0]
        assert named(frame) == expected
        assert frame.shape == ((96, 64, 3) if matrix[1] else (64, 96, 3))


def test_a_matrix_beside_the_eight(tmp_path):
    path = write_video(tmp_path / "a.mp4", np.stack([corners()] * 3))
    turn(path, (1, 1, -1, 1))
    for read in READERS:
        with pytest.raises(ValueError, match="a.mp4: it is turned by an odd angle"):
            read(path)


@pytest.mark.parametrize("kind", ["mp4", "mkv", "mov", "avi"])
@pytest.mark.parametrize(
    ("ratio", "width"), [((2, 1), 192), ((1, 2), 48), ((8, 9), 85), ((1, 1), 96), ((0, 1), 96)]
)
def test_pixels_are_square(tmp_path, kind, ratio, width):
    def setup(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(*ratio)

    path = write_video(tmp_path / f"a.{kind}", np.stack([corners()] * 3), setup=setup)
    for read in READERS:
        assert read(path).shape[1:3] == (64, width)
        assert named(read(path)[0]) == "rgbk"


def test_pixels_are_square_before_the_picture_is_turned(tmp_path):
    def setup(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(2)

    path = write_video(tmp_path / "a.mp4", np.stack([corners()] * 3), setup=setup)
    turn(path, (0, 1, -1, 0))
    content = path.read_bytes()
    assert read_video(path).shape[1:3] == (192, 64), content[:0]


def test_a_cover_is_not_the_video(tmp_path):
    path = tmp_path / "a.mp4"
    odd_files.with_cover(path, corners(), numbered(5))
    assert indices(read_video(path)) == list(range(5))
    assert indices(read_image(path)) == [0]


def test_a_size_that_changes(tmp_path):
    content = b""
    for size in (32, 64):
        write_video(tmp_path / "part.h264", numbered(5, size), options={"bf": "0"})
        content += (tmp_path / "part.h264").read_bytes()
    (tmp_path / "a.h264").write_bytes(content)
    says = "cannot read the video .*a.h264: its size changes from 32x32 to 64x64 at 0.2. s"
    with pytest.raises(ValueError, match=says):
        read_video(tmp_path / "a.h264")
    clips = read_clips(tmp_path / "a.h264", 4, 24)
    assert indices(next(clips)) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=says):
        next(clips)


def test_sizes_beyond_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(videos, "PIXELS", 64 * 96 - 1)
    path = write_video(tmp_path / "a.mp4", np.stack([corners()] * 3))
    for read in READERS:
        with pytest.raises(ValueError, match="a.mp4: its pictures of 64x96 are too large"):
            read(path)


# -------------------------------------------------------------------------------- colours of videos


CODES = {
    "601": (6, 6, 6, 1),
    "601 full": (6, 6, 6, 2),
    "709": (1, 1, 1, 1),
    "709 full": (1, 1, 1, 2),
    "sRGB": (1, 1, 13, 1),
}


@pytest.mark.parametrize("name", CODES)
def test_matrix_and_range_are_minded(tmp_path, name):
    """By a video that is written by hand, by the formulas."""
    matrix, _, _, limits = CODES[name]
    red, blue = (0.299, 0.114) if matrix == 6 else (0.2126, 0.0722)
    r, g, b = 200, 120, 90
    luma = red * r + (1 - red - blue) * g + blue * b
    differences = (b - luma) / (2 - 2 * blue), (r - luma) / (2 - 2 * red)
    if limits == 1:
        levels = [16 + luma * 219 / 255, *(128 + x * 224 / 255 for x in differences)]
    else:
        levels = [luma, *(128 + x for x in differences)]

    yuv = np.empty((96, 64), np.uint8)
    yuv[:64] = round(levels[0])
    yuv[64:80] = round(levels[1])
    yuv[80:] = round(levels[2])
    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        stream = file.add_stream("ffv1", 24)
        stream.height, stream.width = 64, 64
        stream.pix_fmt = "yuv420p"
        colours(*CODES[name])(stream)
        frame = av.VideoFrame.from_ndarray(yuv, "yuv420p")
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    assert np.abs(read_video(tmp_path / "a.mkv")[0, 30, 30] - np.array([r, g, b])).max() <= 2


def test_wide_primaries_are_converted(tmp_path):
    def read(primaries):
        frames = np.full((2, 32, 64, 3), (90, 160, 110), np.uint8)
        setup = colours(1, primaries, 1)
        path = tmp_path / "a.mp4"
        write_video(path, frames, fmt="yuv444p", options={"crf": "0"}, setup=setup)
        return read_video(path)[0, 9, 9]

    plain = read(1)
    expected = colour.from_primaries(plain, colour.DISPLAY_P3)
    assert np.array_equal(read(12), expected)
    assert np.abs(expected.astype(int) - plain).max() > 20

    # By the matrix of ITU-R BT.2087.
    light = ((plain / 255 + 0.055) / 1.055) ** 2.4
    to_709 = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
    expected = 1.055 * (to_709 @ light).clip(0, 1) ** (1 / 2.4) - 0.055
    assert np.abs(read(9) - 255 * expected.clip(0, 1)).max() <= 1.5


@pytest.mark.parametrize(("transfer", "kind"), [(16, "PQ"), (18, "HLG")])
def test_hdr_is_refused(tmp_path, transfer, kind):
    frames = np.full((9, 32, 64, 3), 190, np.uint8)
    setup = colours(9, 9, transfer)
    path = tmp_path / "a.mp4"
    write_video(path, frames, codec="libx265", fmt="yuv420p10le", options=QUIET, setup=setup)
    for read in READERS:
        with pytest.raises(ValueError, match=rf"a.mp4: it is HDR \({kind}\), .* convert it to SDR"):
            read(path)


@pytest.mark.parametrize(
    ("name", "codec", "fmt"),
    [
        ("a.mov", "png", "rgba"),
        ("a.mov", "qtrle", "argb"),
        ("a.mov", "prores_ks", "yuva444p10le"),
        ("a.mkv", "ffv1", "bgra"),
        ("a.apng", "apng", "rgba"),
        ("a.webm", "libvpx-vp9", "yuva420p"),
    ],
)
def test_what_is_transparent_is_white_in_videos(tmp_path, name, codec, fmt):
    frames = np.stack([np.asarray(cut_out())] * 3)
    path = write_video(tmp_path / name, frames, codec=codec, fmt=fmt)
    for read in READERS:
        frame = read(path)[0]
        assert frame[2, 2].min() >= 253
        assert np.abs(frame[16, 32] - np.array([200, 120, 90])).max() <= 8


def test_a_gif_as_a_video(tmp_path):
    cut_out().save(tmp_path / "a.gif", save_all=True, append_images=[cut_out()], duration=100)
    assert read_video(tmp_path / "a.gif")[0, 0, 0].tolist() == [255, 255, 255]


# --------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize(
    ("rate", "fps", "expected"),
    [
        (24, 24, [0, 1, 2, 3, 4]),
        (48, 24, [0, 2, 4, 6, 8]),
        (30, 24, [0, 1, 3, 4, 5]),  # 0, 1.25, 2.5 (up), 3.75, 5
        (16, 24, [0, 1, 1, 2, 3]),  # 0, .67, 1.33, 2, 2.67
        (10, 24, [0, 0, 1, 1, 2]),  # 0, .42, .83, 1.25, 1.67
    ],
)
@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi", "h264"])
def test_clips_take_the_frames_nearest_in_time(tmp_path, rate, fps, expected, kind):
    """Of constant rates; Matroska rounds to milliseconds, AVI and bare streams have no times."""
    path = write_video(tmp_path / f"v.{kind}", numbered(20), rate)
    clip = next(read_clips(path, 5, fps))
    assert clip.dtype == np.uint8
    assert clip.shape == (5, 32, 32, 3)
    assert indices(clip) == expected


@pytest.mark.parametrize(("rate", "fps"), [(24, 24), (48, 24), (30, 24), (16, 24), (10, 24)])
@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_clips_follow_each_other(tmp_path, rate, fps, frames, kind):
    """Clip i starts at frame i * frames of the video at the target rate; the rest is dropped."""
    path = write_video(tmp_path / f"v.{kind}", numbered(23), rate)
    nearest = [int(k * rate / fps + 0.5) for k in range(99)]
    whole = [i for i in nearest if i < 23]
    starts = range(0, len(whole) - frames + 1, frames)
    clips = list(read_clips(path, frames, fps))
    assert [indices(clip) for clip in clips] == [whole[i : i + frames] for i in starts]
    assert all(clip.dtype == np.uint8 and clip.shape == (frames, 32, 32, 3) for clip in clips)


PHONE = [
    *np.arange(15) / 30,
    *(0.5 + np.arange(8) / 15),
    *(1.03 + np.arange(15) / 30),
]  # dark between
SCREEN = [0, 1, *(1 + np.arange(1, 31) / 60)]  # one picture for a second, then motion
BROWSER = np.cumsum([0, *((20 + 37 * i % 41) / 1000 for i in range(39))]).tolist()
VP8 = {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}}


def without_rate(path):
    """As MediaRecorder writes it."""
    content = bytearray(path.read_bytes())
    at = content.index(b"\x23\xe3\x83")
    length = 4 + (content[at + 3] & 0x7F)
    content[at : at + length] = bytes([0xEC, 0x80 | (length - 2)]) + bytes(length - 2)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "times", "options"),
    [
        ("phone.mp4", PHONE, {"rate": 30}),
        ("phone.mov", PHONE, {"rate": 30}),
        ("phone.mkv", PHONE, {"rate": 30}),
        ("phone.avi", PHONE, {"rate": 30, "codec": "ffv1"}),
        ("phone.ts", PHONE, {"rate": 30}),
        ("screen.mp4", SCREEN, {"rate": 60}),
        ("screen.webm", SCREEN, {"rate": 60, **VP8}),
        ("browser.webm", BROWSER, {"rate": 1000, **VP8}),
        ("recorder.webm", BROWSER, {"rate": 1000, **VP8}),
    ],
)
def test_variable_rates(tmp_path, name, times, options):
    path = write_video(tmp_path / name, numbered(len(times)), times=times, **options)
    if name == "recorder.webm":
        without_rate(path)
    count = int(times[-1] * 24) + 1
    taken = indices(next(read_clips(path, count, 24)))
    for k, i in enumerate(taken):
        distances = np.abs(np.array(times) - k / 24)
        assert distances[i] <= distances.min() + 0.0021, (k, i)  # times are written in milliseconds


def test_a_last_picture_that_stays(tmp_path):
    """It is taken to its end, not to half of it."""
    times = [0, 1 / 24, 2 / 24]
    path = write_video(tmp_path / "a.mp4", numbered(3), times=times, last=1.0, options={"bf": "0"})
    clips = np.concatenate(list(read_clips(path, 1, 24)))
    assert indices(clips) == [0, 1] + [2] * 24
    assert indices(read_video(path, last=5, fps=24)) == [2] * 5
    path = write_video(tmp_path / "b.mp4", numbered(1), times=[0], last=1.0)
    assert len(list(read_clips(path, 1, 24))) == 24


def test_a_clock_that_is_set_back(tmp_path):
    """Two recordings, one behind the other in one file."""
    write_video(tmp_path / "part.ts", numbered(20))
    (tmp_path / "a.ts").write_bytes(2 * (tmp_path / "part.ts").read_bytes())
    taken = indices(np.concatenate(list(read_clips(tmp_path / "a.ts", 1, 24))))
    assert taken == [*range(20), *range(20)]


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (24, [31, 32, 33, 34, 35, 36, 37, 38, 39]),
        (60, [19, 22, 24, 27, 29, 32, 34, 37, 39]),  # 2.5 apart, halves up
        (48, [23, 25, 27, 29, 31, 33, 35, 37, 39]),
        (12, [35, 36, 36, 37, 37, 38, 38, 39, 39]),
        (30, [29, 30, 32, 33, 34, 35, 37, 38, 39]),  # 1.25 apart
    ],
)
def test_last_frames_at_a_rate(tmp_path, rate, expected):
    path = write_video(tmp_path / "a.mp4", numbered(40), rate)
    assert indices(read_video(path, last=9, fps=24)) == expected
    assert indices(read_video(path, last=9)) == list(range(31, 40))
    assert indices(read_video(path, last=1, fps=24)) == [39]
    nearest = [int(k * rate / 24 + 0.5) for k in range(99)]
    assert indices(read_video(path, fps=24)) == [i for i in nearest if i < 40]


def test_too_few_frames(tmp_path):
    path = write_video(tmp_path / "v.mp4", numbered(22), 30)
    assert indices(next(read_clips(path, 18, 24)))[-1] == 21
    with pytest.raises(ValueError, match="v.mp4 has 18 frames at 24 fps, fewer than 19"):
        next(read_clips(path, 19, 24))
    with pytest.raises(ValueError, match="v.mp4 has 22 frames, 23 are needed"):
        read_video(path, last=23)
    assert indices(read_video(path, last=18, fps=24))[0] == 0
    with pytest.raises(ValueError, match="v.mp4 has 18 frames at 24 fps, 19 are needed"):
        read_video(path, last=19, fps=24)


@pytest.mark.parametrize("fps", [float("inf"), float("nan"), 0, -24])
def test_rates_that_are_none(tmp_path, fps):
    path = write_video(tmp_path / "v.mp4", numbered(5))
    for read in (lambda: next(read_clips(path, 2, fps)), lambda: read_video(path, 2, fps)):
        with pytest.raises(ValueError, match=f"{fps} frames a second: it must be a number above 0"):
            read()


def test_clips_are_read_once_and_no_further_than_asked_for(tmp_path, monkeypatch):
    """Whole clips, one in memory at a time; what was yielded is not changed by what follows."""
    decoded = []

    def endless(path):
        for i in range(10**9):
            decoded.append(i)
            frame = np.full((256, 256, 3), i % 256, np.uint8)
            yield Shown(Fraction(i, 48), Fraction(2 * i + 1, 96), frame)

    monkeypatch.setattr(pictures, "video_frames", endless)
    first, second = islice(read_clips(tmp_path / "v.mp4", 5, 24), 2)
    assert first[:, 0, 0, 0].tolist() == [0, 2, 4, 6, 8]
    assert second[:, 0, 0, 0].tolist() == [10, 12, 14, 16, 18]
    assert decoded == list(range(19))
    tracemalloc.start()
    for clip in islice(read_clips(tmp_path / "v.mp4", 10, 24), 20):
        assert len(clip) == 10
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * clip.nbytes < 20 * clip.nbytes


def test_last_frames_are_all_that_is_kept(tmp_path, monkeypatch):
    def long(path):
        for i in range(600):
            frame = np.full((64, 64, 3), i % 256, np.uint8)
            yield Shown(Fraction(i, 60), Fraction(2 * i + 1, 120), frame)

    monkeypatch.setattr(pictures, "video_frames", long)
    tracemalloc.start()
    frames = read_video(tmp_path / "v.mp4", last=9, fps=24)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert frames[-1, 0, 0, 0] == 599 % 256
    assert peak < 60 * frames[0].nbytes


def test_two_last_frames_of_one_time(tmp_path, monkeypatch):
    """As a damaged transport stream may have them: the video ends with the last one."""
    times = [(0, 1), (2, 3), (4, 4), (4, 6)]  # in 1/48 s

    def damaged(path):
        for i, (start, until) in enumerate(times):
            yield Shown(Fraction(start, 48), Fraction(until, 48), np.full((8, 8, 3), i, np.uint8))

    (tmp_path / "v.ts").touch()
    monkeypatch.setattr(pictures, "video_frames", damaged)
    frames = read_video(tmp_path / "v.ts", last=3, fps=24)
    assert frames[:, 0, 0, 0].tolist() == [1, 3, 3]


# -------------------------------------------------------------------------------- folders of images


def test_clip_of_images(tmp_path):
    for i, frame in enumerate(numbered(12)):
        Image.fromarray(frame).save(tmp_path / f"frame{i}.png")  # not padded: 10 comes after 9
    assert indices(next(read_clips(tmp_path, 11, 24))) == list(range(11))


def test_images_of_two_sizes(tmp_path):
    for i in range(5):
        Image.new("RGB", (32 + 16 * (i == 3), 32)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="differ in size: 3.png is 32x48, 0.png 32x32"):
        next(read_clips(tmp_path, 5, 24))


def test_folders_that_are_no_clip(tmp_path):
    with pytest.raises(ValueError, match="has 0 frames"):
        next(read_clips(tmp_path, 5, 24))
    (tmp_path / ".DS_Store").write_bytes(b"no frame")
    with pytest.raises(ValueError, match="has 0 frames"):
        next(read_clips(tmp_path, 5, 24))
    for content in (b"no image", b"x"):
        (tmp_path / "0.png").write_bytes(content)
        with pytest.raises(ValueError, match="cannot read the image .*0.png"):
            next(read_clips(tmp_path, 5, 24))


# ----------------------------------------------------------------------------------- damaged videos


VIDEOS = {
    "fast.mp4": {"container": {"movflags": "faststart"}},
    "slow.mp4": {},
    "sound.mp4": {"container": {"movflags": "faststart"}, "sound": True},
    "pieces.mp4": {
        "container": {"movflags": "frag_keyframe+empty_moov"},
        "options": {"g": "12"},
    },
    "a.mov": {"codec": "prores_ks", "fmt": "yuv422p10le", "container": {"movflags": "faststart"}},
    "a.mkv": {},
    "a.webm": VP8,
    "sound.webm": {**VP8, "sound": True},
    "a.avi": {"codec": "mpeg4"},
}


def noise(count):
    coarse = np.random.default_rng(0).integers(0, 256, (count, 4, 6, 3), dtype=np.uint8)
    return coarse.repeat(16, 1).repeat(16, 2)


@pytest.mark.parametrize("name", VIDEOS)
def test_a_video_that_was_cut_off(tmp_path, name):
    whole = write_video(tmp_path / f"whole.{name}", noise(48), **VIDEOS[name])
    assert len(read_video(whole)) == 48
    content = whole.read_bytes()
    path = tmp_path / name
    for part in (0.3, 0.6, 0.9):
        path.write_bytes(content[: int(part * len(content))])
        for options in ({}, {"last": 5}, {"last": 5, "fps": 24}):
            with pytest.raises(ValueError, match=f"cannot read the video .*{name}: ") as error:
                read_video(path, **options)
            assert "\n" not in str(error.value)


def test_clips_before_a_cut_are_read(tmp_path):
    options = {"movflags": "faststart"}
    path = write_video(tmp_path / "a.mp4", noise(48), container=options, options={"bf": "0"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    clips = read_clips(path, 9, 24)
    assert len(next(clips)) == len(next(clips)) == 9
    with pytest.raises(ValueError, match="a.mp4: it is cut off: .* bytes are there"):
        list(clips)


@pytest.mark.parametrize("name", VIDEOS)
def test_a_download_that_has_its_space_only(tmp_path, name):
    path = write_video(tmp_path / name, noise(48), **VIDEOS[name])
    content = bytearray(path.read_bytes())
    half = len(content) // 2
    content[half:] = bytes(len(content) - half)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot read the video .*{name}: "):
        read_video(path)


def test_sound_that_is_longer_than_the_video(tmp_path):
    for name in ("a.mp4", "a.webm"):
        options = VP8 if name == "a.webm" else {}
        path = write_video(tmp_path / name, numbered(12), sound=True, **options)
        assert indices(read_video(path)) == list(range(12))
        assert len(list(read_clips(path, 4, 24))) == 3


def test_what_is_no_image_or_video(tmp_path):
    """One line that names the file, whatever the libraries raise."""
    whole = tmp_path / "whole.png"
    picture().save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:400])
    (tmp_path / "chunk.png").write_bytes(whole.read_bytes().replace(b"IDAT", b"ID\0T", 1))
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "letter.txt").write_text("x")
    (tmp_path / "text.mp4").write_text("hello" * 1000)
    (tmp_path / "empty.png").touch()
    write_video(tmp_path / "codec.mp4", numbered(3))
    content = (tmp_path / "codec.mp4").read_bytes()
    (tmp_path / "codec.mp4").write_bytes(content.replace(b"avc1", b"Shr9"))
    (tmp_path / "unknown.mp4").write_bytes(content.replace(b"avc1", b"nope"))
    (tmp_path / "nothing.y4m").write_bytes(b"YUV4MPEG2 W16 H16 F24:1\nFRAME\n")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", None))
        file.writeframes(bytes(1600))
    os.mkfifo(tmp_path / "pipe")  # to read it would wait for ever

    names = [file.name for file in tmp_path.iterdir() if file != whole]
    for name in [*names, "missing.png", "."]:
        for read in (read_image, read_video):
            with pytest.raises(ValueError, match="cannot read the ") as error:
                read(tmp_path / name)
            assert str(tmp_path / name) in str(error.value)
            assert "\n" not in str(error.value)
            assert "NoneType" not in str(error.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("a"),
        KeyError("a"),
        struct.error("a"),
        NotImplementedError(),
        TypeError("a"),
        MemoryError(),
        RecursionError("a"),
        StopIteration(),
    ],
)
def test_whatever_a_reader_raises(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    picture().save(tmp_path / "a.png")
    write_video(tmp_path / "a.mp4", numbered(3))
    monkeypatch.setattr(Image, "open", fail)
    monkeypatch.setattr(av, "open", fail)
    for read, name in ((read_image, "a.png"), (read_video, "a.mp4"), (first_clip, "a.mp4")):
        with pytest.raises(ValueError, match=f"cannot read the .*{name}: "):
            read(tmp_path / name)


def test_ctrl_c_is_no_damage(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    picture().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", interrupt)
    with pytest.raises(KeyboardInterrupt):
        read_image(tmp_path / "a.png")


def test_titles_of_another_encoding(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        file.metadata["title"] = "Fuer"
        stream = file.add_stream("ffv1", 24)
        stream.height, stream.width = 32, 32
        for frame in numbered(3):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        file.mux(stream.encode())
    path.write_bytes(path.read_bytes().replace(b"Fuer", "Für ".encode("latin1")))
    assert len(read_video(path)) == 3


# --------------------------------------------------------------------------------- local files only


@pytest.fixture
def server():
    """An address, and the first line of each request that comes to it."""
    requests = []
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(5)

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            requests.append(connection.recv(99))
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", requests
    listener.close()


PLAYLISTS = {
    "a.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n",
    "a.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n",
    "a.png": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n",
    "a.ffconcat": "ffconcat version 1.0\nfile {}\n",
    "a.mpd": '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
    '<Representation id="0" mimeType="video/mp4"><BaseURL>{}</BaseURL></Representation>'
    "</AdaptationSet></Period></MPD>",
    "a.sdp": "v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=control:{}\n",
    "a.srt": "1\n00:00:00,000 --> 00:00:01,000\n{}\n",
    "a.nfo": 100 * "{}\n",  # FFmpeg would draw it
    "a.txt": 100 * "{}\n",
}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_nothing_else_is_opened(tmp_path, name, server):
    address, requests = server
    other = write_video(tmp_path / "other.mp4", numbered(12))
    for target in (f"{address}/a.ts", str(other), "other.mp4", f"file:{other}"):
        (tmp_path / name).write_text(PLAYLISTS[name].replace("{}", target))
        for read in READERS:
            with pytest.raises(ValueError, match=f"cannot read the .*{name}: "):
                read(tmp_path / name)
    assert not requests


def test_addresses_are_no_files(tmp_path, server, monkeypatch):
    address, requests = server
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "a.mp4", numbered(3))
    schemes = ("concat:a.mp4|a.mp4", "file:a.mp4", "pipe:0", "subfile,,start,0,end,0,,:a.mp4")
    for path in (f"{address}/a.png", f"{address}/a.mp4", f"hls+{address}/a.m3u8", *schemes):
        for read in READERS:
            with pytest.raises(ValueError, match="no such file here .addresses are not opened"):
                read(path)
    assert not requests


@pytest.mark.parametrize(
    "name", ["a:b.mp4", "http:x.mp4", "a%03d.mp4", "ü b\n'c.mp4", "a.mp4|b.mp4"]
)
def test_names_like_addresses(tmp_path, monkeypatch, name):
    write_video(tmp_path / "plain.mp4", numbered(12))
    (tmp_path / "plain.mp4").rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for path in (name, tmp_path / name):
        assert indices(read_video(path)) == list(range(12))
        assert len(first_clip(path)) == 2
        assert read_image(path).shape == (1, 32, 32, 3)

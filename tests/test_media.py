"""Pixels in and out: what image files become, fitting, the mp4 writer, contact sheets."""

import struct
import threading
import wave

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from wan5b import media
from wan5b.extras import files
from wan5b.extras.files import read_clips


def picture(height=30, width=50, seed=0):
    """A smooth colour picture without symmetry."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def solid(levels, height=64, width=64):
    """Gray frames, one of each level, uint8 [T, H, W, 3]."""
    return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, height, width, 3)


# ------------------------------------------------------------------------------------------- images


def transparent():
    image = picture().convert("RGBA")
    image.putalpha(Image.new("L", image.size, 40))  # dropped, not blended
    return image


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("a.png", picture(), picture()),
        ("a.png", transparent(), picture()),
        ("a.png", picture().convert("L"), picture().convert("L")),
        ("a.png", picture().convert("LA"), picture().convert("L")),
        ("a.png", picture().convert("1"), picture().convert("1")),
        ("a.png", picture().quantize(16), picture().quantize(16)),
        ("a.webp", picture(), picture()),
        ("a.jpg", picture().convert("CMYK"), picture()),
        ("a.jpg", picture(31, 17), picture(31, 17)),
    ],
    ids=["rgb", "alpha", "gray", "gray-alpha", "bilevel", "palette", "webp", "cmyk", "odd"],
)
def test_image_formats(tmp_path, name, image, expected):
    image.save(tmp_path / name, quality=95, lossless=True)
    pixels = files.read_image(tmp_path / name)
    expected = np.asarray(expected.convert("RGB"))[None]
    assert pixels.dtype == np.uint8
    assert pixels.shape == expected.shape
    bar = 6 if name == "a.jpg" else 0
    assert np.abs(pixels.astype(int) - expected).mean() <= bar


def test_16_bit_images_keep_their_range(tmp_path):
    gray = np.linspace(0, 65535, 30 * 50).reshape(30, 50).astype(np.uint16)
    Image.fromarray(gray).save(tmp_path / "a.png")
    pixels = files.read_image(tmp_path / "a.png")[0]
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert np.abs(pixels - gray[..., None] / 257).max() <= 0.5


def test_formats_of_ffmpeg(tmp_path):
    """What Pillow does not read: the first frame."""
    frames = np.stack([picture(64, 96, seed) for seed in (1, 2)])
    iio.imwrite(tmp_path / "a.mp4", frames, plugin="pyav", codec="libx264")
    pixels = files.read_image(tmp_path / "a.mp4")
    assert np.array_equal(pixels, files.read_video(tmp_path / "a.mp4")[:1])


def test_first_frame_of_an_animation(tmp_path):
    first = picture(seed=1).quantize(64)
    second = picture(seed=2).quantize(64)
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert iio.imread(tmp_path / "a.gif").shape[0] == 2
    assert np.array_equal(files.read_image(tmp_path / "a.gif")[0], np.asarray(first.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("orientation", [2, 3, 4, 5, 6, 7, 8])
def test_photographs_are_upright(tmp_path, orientation, mode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().convert(mode).save(tmp_path / "a.jpg", exif=exif)
    stored = Image.open(tmp_path / "a.jpg")
    upright = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    assert not np.array_equal(upright, np.asarray(stored.convert("RGB")))
    assert np.array_equal(files.read_image(tmp_path / "a.jpg")[0], upright)


@pytest.mark.parametrize(
    ("degrees", "matrix"), [(90, (0, 1, -1, 0)), (180, (-1, 0, 0, -1)), (270, (0, -1, 1, 0))]
)
def test_videos_are_upright(tmp_path, degrees, matrix):
    """A phone's, which tells by a matrix in its header how to turn the pictures, clockwise."""
    lying = np.zeros((2, 64, 96, 3), np.uint8)
    lying[:, :32, :, 0] = lying[:, 32:, :48, 1] = 255  # above red, below green and black
    path = tmp_path / "a.mp4"
    iio.imwrite(path, lying, plugin="pyav", codec="libx264")

    def header(a, b, c, d):
        """The matrix in the track's header, in 16.16 fixed point (the last entry in 2.30)."""
        one = 1 << 16
        return struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)

    content = path.read_bytes()
    upright = header(1, 0, 0, 1)
    start = content.index(upright, content.index(b"tkhd"))
    path.write_bytes(content[:start] + header(*matrix) + content[start + len(upright) :])

    expected = np.rot90(lying, -degrees // 90, (1, 2))
    for read in (files.read_video, lambda path: next(read_clips(path, 2, 24))):
        assert read(path).shape == expected.shape
        assert np.abs(read(path).astype(int) - expected).mean() < 20
    assert np.array_equal(files.read_image(path), files.read_video(path)[:1])


def test_damaged_pictures(tmp_path):
    """What Pillow and PyAV raise there is neither an OSError nor a ValueError."""
    picture().save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "chunk.png").write_bytes(content.replace(b"IDAT", b"ID\0T", 1))

    # A photograph of 200 megapixels.
    Image.fromarray(np.zeros((10000, 20000), np.uint8)).save(tmp_path / "huge.png")

    black = np.zeros((2, 64, 96, 3), np.uint8)
    iio.imwrite(tmp_path / "a.mp4", black, plugin="pyav", codec="libx264")
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "codec.mp4").write_bytes(content.replace(b"avc1", b"Shr9"))

    for name in ("chunk.png", "huge.png", "codec.mp4"):
        with pytest.raises(ValueError, match=f"cannot read the image .*{name}"):
            files.read_image(tmp_path / name)
    with pytest.raises(ValueError, match="cannot read the video .*codec.mp4"):
        files.read_video(tmp_path / "codec.mp4")
    with pytest.raises(files.UNREADABLE):
        next(read_clips(tmp_path / "codec.mp4", 2, 24))


def test_what_is_no_image_or_video(tmp_path):
    """One line that names the file, whatever the libraries raise."""
    whole = tmp_path / "whole.png"
    picture().save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:400])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "text.mp4").write_text("hello" * 1000)
    (tmp_path / "empty.png").touch()
    with wave.open(str(tmp_path / "sound.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", None))
        file.writeframes(bytes(1600))

    for name in ("cut.png", "text.png", "text.mp4", "empty.png", "sound.wav", "missing.png", "."):
        for read in (files.read_image, files.read_video):
            with pytest.raises(ValueError, match="cannot read the ") as error:
                read(tmp_path / name)
            assert str(tmp_path / name) in str(error.value)
            assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------- sizes


def test_parse_size():
    assert files.parse_size("704x1280") == (704, 1280)
    assert files.parse_size("32X64") == (32, 64)
    for text, valid in {"70x96": "64 or 96 by 96 or 128", "0x96": "32 or 64 by 96 or 128"}.items():
        says = f"size {text} is not HEIGHTxWIDTH .* of 32; nearest valid: {valid}"
        with pytest.raises(ValueError, match=says):
            files.parse_size(text)
    for text in ("64", "64x-96", "axb", "32x32x32", ""):
        with pytest.raises(ValueError, match=f"size {text} is not HEIGHTxWIDTH in multiples of 32"):
            files.parse_size(text)


def test_latent_frames():
    assert [media.latent_frames(n) for n in (1, 5, 81, 121)] == [1, 2, 21, 31]
    for n, valid in {0: "1 or 5", -3: "1 or 5", 4: "1 or 5", 82: "81 or 85"}.items():
        with pytest.raises(ValueError, match=f"{n} frames are not 4k . 1; nearest valid: {valid}"):
            media.latent_frames(n)


# ------------------------------------------------------------------------------------------ fitting


@pytest.mark.parametrize(
    ("shape", "expected"),
    [  # (height, width) both; by hand from area 901120
        ((704, 1280), (704, 1280)),
        # Width first: 1265.7 -> 1248 x 704, 1.773. Height first: 1280 x 704, 1.818.
        ((720, 1280), (704, 1248)),
        # Height first: 704 x 1248, 0.564. Width first: 704 x 1280, 0.55.
        ((1280, 720), (1248, 704)),
        ((1000, 1500), (768, 1152)),
        ((500, 500), (928, 960)),  # 928 x 960 or 960 x 928, equally near: height first
        ((1, 100000), (32, 28160)),  # 32 high at least, and still not above the area
        ((100000, 1), (28160, 32)),
    ],
)
def test_fitting_size(shape, expected):
    assert files.fitting_size(*shape) == expected


def test_fitting_size_never_exceeds_the_area():
    for height, width in np.random.default_rng(0).integers(1, 5000, (500, 2)).tolist():
        for area in (704 * 1280, 64 * 96):
            h, w = files.fitting_size(height, width, area)
            assert h % 32 == w % 32 == 0 < h * w <= area, (height, width)


def test_fit_and_to_frames_are_inverse():
    frames = np.random.default_rng(0).integers(0, 256, (3, 32, 64, 3), dtype=np.uint8)
    pixels = media.fit(frames, 32, 64)
    assert pixels.shape == (3, 3, 32, 64)
    assert pixels.dtype == torch.float32
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert np.array_equal(media.to_frames(pixels).numpy(), frames)
    beyond = torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0]).view(1, 5, 1, 1).expand(3, -1, 2, 2)
    assert media.to_frames(beyond)[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]
    assert torch.equal(media.to_frames(beyond.bfloat16()), media.to_frames(beyond))


@pytest.mark.parametrize(
    ("shape", "size", "box"),
    [  # a picture of (height, width), scaled to (width, height), cut to (left, top, right, bottom)
        ((64, 160), (160, 64), (32, 0, 128, 64)),
        ((131, 96), (96, 131), (0, 33, 96, 97)),
        ((50, 70), (96, 69), (0, 2, 96, 66)),
        ((1000, 999), (96, 96), (0, 16, 96, 80)),
        ((3, 5), (107, 64), (5, 0, 101, 64)),
    ],
)
def test_fit_covers_and_crops_in_the_middle(shape, size, box):
    image = picture(*shape)
    expected = np.asarray(image.resize(size, Image.Resampling.LANCZOS).crop(box))
    frames = media.to_frames(media.fit(np.asarray(image)[None], 64, 96))
    assert np.array_equal(frames[0].numpy(), expected)


# ------------------------------------------------------------------------------------------- videos


def test_writer_writes_what_it_was_given(tmp_path):
    levels = list(range(0, 250, 10))
    writer = media.VideoWriter(tmp_path / "a.b.mp4", fps=24, keep={0, 12, 24})
    for chunk in (levels[:1], levels[1:5], levels[5:]):
        writer.add(solid(chunk))
        assert not (tmp_path / "a.b.mp4").exists()
    writer.close()
    assert [file.name for file in tmp_path.iterdir()] == ["a.b.mp4"]
    frames = iio.imread(tmp_path / "a.b.mp4", plugin="pyav")
    assert frames.shape == (25, 64, 64, 3)
    assert np.abs(frames.mean((1, 2, 3)) - levels).max() < 3
    assert iio.immeta(tmp_path / "a.b.mp4", plugin="pyav")["fps"] == 24
    assert [frame[0, 0, 0] for frame in writer.kept] == [0, 120, 240]
    assert all(frame.base is None for frame in writer.kept), (
        "a view keeps its whole chunk in memory"
    )
    assert np.array_equal(files.read_video(tmp_path / "a.b.mp4", last=7), frames[-7:])
    assert np.array_equal(files.read_video(tmp_path / "a.b.mp4"), frames)
    with pytest.raises(ValueError, match="25 frames, 26 are needed"):
        files.read_video(tmp_path / "a.b.mp4", last=26)


def test_add_returns_before_its_frames_are_encoded(tmp_path, monkeypatch):
    writer = media.VideoWriter(tmp_path / "a.mp4")
    encode, gate = writer.file.write_frame, threading.Event()
    monkeypatch.setattr(writer.file, "write_frame", lambda frame: gate.wait(30) and encode(frame))
    chunk = solid([200, 100]).clone()
    writer.add(chunk)
    chunk.zero_()  # the caller may use its memory again
    assert writer.count == 0
    gate.set()
    writer.close()
    assert writer.count == 2
    assert np.abs(files.read_video(tmp_path / "a.mp4").mean((1, 2, 3)) - [200, 100]).max() < 3


def test_failure_to_encode_is_raised_and_claims_no_file(tmp_path, monkeypatch):
    writer = media.VideoWriter(tmp_path / "a.mp4")
    writer.add(solid([1, 2]))
    writer.pending.result()
    monkeypatch.setattr(writer.file, "write_frame", lambda frame: 1 / 0)
    writer.add(solid([3]))
    with pytest.raises(ZeroDivisionError):
        writer.close()
    assert [file.name for file in tmp_path.iterdir()] == ["a.partial.mp4"]
    assert len(files.read_video(tmp_path / "a.partial.mp4")) == 2


def test_closing_without_frames_leaves_nothing(tmp_path):
    media.VideoWriter(tmp_path / "a.mp4").close()
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------- sheets


def test_sheet_indices():
    assert files.sheet_indices(1) == {0}
    assert files.sheet_indices(5) == set(range(5))
    indices = sorted(files.sheet_indices(81))
    assert len(indices) == 16
    assert (indices[0], indices[-1]) == (0, 80)
    assert set(np.diff(indices)) == {5, 6}


@pytest.mark.parametrize(("width", "tile"), [(640, (32, 320)), (128, (64, 128))])
def test_sheet_is_a_grid_in_order(tmp_path, width, tile):
    levels = [10, 50, 90, 130, 170, 210]
    files.write_sheet(tmp_path / "a.png", list(solid(levels, 64, width).numpy()))
    sheet = iio.imread(tmp_path / "a.png")
    h, w = tile
    assert sheet.shape == (2 * h, 4 * w, 3)
    tiles = sheet.reshape(2, h, 4, w, 3).transpose(0, 2, 1, 3, 4).reshape(8, -1)
    assert (tiles == np.array([*levels, 0, 0])[:, None]).all()

"""Pictures that few programs write, against what they are made of: gray of TIFF, colours that
nobody states, matrices, fields.
"""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from odd_files import colours, corners, named, png_chunk, turn, write_video
from PIL import Image

from wan5b.extras.pictures import read_clips, read_image, read_video

# --------------------------------------------------------------------------------- stills of others


def gray_tiff(path, levels, bits, photometric, sample_format=1):
    """A gray TIFF of one strip; levels [H, W] of at most 16 bits."""
    h, w = levels.shape
    if bits == 12:
        high, low = levels.reshape(-1, 2).T.astype(int)
        packed = np.stack([high >> 4, (high & 15) << 4 | low >> 8, low & 255], 1)
        content = packed.astype(np.uint8).tobytes()
    else:
        content = levels.astype("<u2").tobytes()

    tags = {256: w, 257: h, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: h}
    tags |= {279: len(content), 339: sample_format}
    directory = struct.pack("<H", len(tags))
    for tag, value in sorted(tags.items()):
        directory += struct.pack("<HHII", tag, 4, 1, value)
    start = 8 + len(content)
    path.write_bytes(b"II*\0" + struct.pack("<I", start) + content + directory + bytes(4))


@pytest.mark.parametrize(("bits", "photometric"), [(12, 1), (16, 0), (16, 1)])
def test_gray_of_tiff_has_ends_of_its_own(tmp_path, bits, photometric):
    """12 bits end at 4095; by photometric 0, as scanners write it, 0 is white."""
    shown = np.linspace(0, 255, 16 * 32).reshape(16, 32)
    levels = (shown if photometric else 255 - shown) / 255 * (2**bits - 1)
    gray_tiff(tmp_path / "a.tif", levels.round(), bits, photometric)
    assert np.abs(read_image(tmp_path / "a.tif")[0, :, :, 0] - shown).max() <= 1


def test_signed_gray_of_tiff_is_refused(tmp_path):
    gray_tiff(tmp_path / "a.tif", np.full((16, 32), 9000), 16, 1, sample_format=2)
    with pytest.raises(ValueError, match="a.tif: its levels are signed, of unknown range"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ((1, 17, 0, 1), r"it is of cinema \(DCI\)"),
        ((10, 13, 0, 1), "it is CIE XYZ"),
        ((1, 13, 0, 0), "its levels are of the limited range"),
    ],
)
def test_codes_that_are_not_read(tmp_path, codes, message):
    Image.new("RGB", (16, 16), (90, 160, 110)).save(tmp_path / "a.png")
    png_chunk(tmp_path / "a.png", b"cICP", bytes(codes))
    with pytest.raises(ValueError, match=f"a.png: {message}"):
        read_image(tmp_path / "a.png")


# ---------------------------------------------------------------------------------- colours of YUV


def flat_video(path, size, matrix, planes):
    """Three frames of one colour, which says its matrix only; planes: levels of Y, Cb, Cr."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("ffv1", 24)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        colours(matrix, 2, 2, 0)(stream)
        frame = av.VideoFrame(size[1], size[0], "yuv420p")
        for plane, level in zip(frame.planes, planes, strict=True):
            plane.update(bytes([level]) * plane.buffer_size)
        for i in range(3):
            frame.pts = i
            frame.time_base = Fraction(1, 24)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


# The levels of Y, Cb, Cr of (200, 120, 90), by the formulas of BT.601 and of BT.709.
BT601 = (137, 103, 165)
BT709 = (132, 107, 164)


@pytest.mark.parametrize("matrix", [2, 0])
@pytest.mark.parametrize(
    ("size", "planes"),
    [
        ((480, 640), BT601),
        ((576, 720), BT601),
        ((704, 1280), BT709),
        ((1280, 704), BT709),
        ((640, 640), BT709),
    ],
)
def test_a_matrix_that_is_not_stated_is_by_the_size(tmp_path, size, planes, matrix):
    """As players have it: HD is BT.709. This is what most encoders write, 0 what some do."""
    flat_video(tmp_path / "a.mkv", size, matrix, planes)
    assert np.abs(read_image(tmp_path / "a.mkv")[0, 9, 9] - np.array([200, 120, 90])).max() <= 2


@pytest.mark.parametrize(
    ("matrix", "kind"), [(8, "YCgCo"), (10, "BT.2020 of constant luminance"), (14, "ICtCp")]
)
def test_matrices_that_are_not_read(tmp_path, matrix, kind):
    flat_video(tmp_path / "a.mkv", (32, 32), matrix, BT709)
    with pytest.raises(ValueError, match=f"a.mkv: its colours are {kind}, which is not read"):
        read_video(tmp_path / "a.mkv")


# ------------------------------------------------------------------------------------------- fields


def woven(count=11, height=64, width=96):
    """A bright column moves to the right, 6 pixels a frame; odd lines are half a frame later."""
    frames = np.full((count, height, width, 3), 16, np.uint8)
    for i in range(count):
        for lines, x in ((slice(0, None, 2), 6 * i), (slice(1, None, 2), 6 * i + 3)):
            frames[i, lines, x : x + 8] = 235
    return frames


def as_fields(stream):
    """Sets the encoder's flags for interlaced coding."""
    stream.codec_context.flags |= 1 << 18 | 1 << 29


def combs(frames):
    """How much neighbouring lines differ inside a frame."""
    lines = frames.astype(float).mean(-1)
    return np.abs(np.diff(lines, axis=1)).mean()


FIELDS = {"a.mp4": "libx264", "b.ts": "mpeg2video", "c.mkv": "mpeg2video", "d.avi": "libx264"}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_are_taken_apart(tmp_path, name):
    """Television's frames hold lines of two times; no frame is lost, all keep their times."""
    options = {"x264-params": "tff=1"} if FIELDS[name] == "libx264" else {"qmin": "1", "b": "4M"}
    frames = woven()
    made = {"codec": FIELDS[name], "options": options}
    path = write_video(tmp_path / name, frames, rate=24, setup=as_fields, **made)
    read = read_video(path)
    assert read.shape == frames.shape
    assert combs(read) < combs(frames) / 4
    light = read[:, 8:-8].astype(float).mean((1, 3)) - 16  # [T, W]
    places = (light * np.arange(96)).sum(1) / light.sum(1)  # of the column
    assert np.abs(np.diff(places) - 6).max() < 1.5

    clip = next(read_clips(path, 9, 24))
    assert np.array_equal(clip, read[:9])
    assert np.array_equal(read_video(path, last=5, fps=24), read[-5:])


def test_fields_of_a_turned_video_with_oblong_pixels(tmp_path):
    def setup(stream):
        as_fields(stream)
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        colours(1, 1, 1)(stream)

    frames = np.stack([corners()] * 5)
    options = {"x264-params": "tff=1"}
    path = write_video(tmp_path / "a.mp4", frames, options=options, setup=setup)
    turn(path, (0, 1, -1, 0))
    read = read_video(path)
    assert read.shape == (5, 192, 64, 3)
    assert [named(frame) for frame in read] == ["brkg"] * 5


def test_fields_whose_size_changes(tmp_path):
    """Two recordings in one file: the first is read whole, then the error comes."""
    parts = []
    for size in (64, 96):
        frames = woven(height=size, width=size)
        made = write_video(tmp_path / "a.ts", frames, codec="mpeg2video", setup=as_fields)
        parts.append(made.read_bytes())
    (tmp_path / "b.ts").write_bytes(b"".join(parts))
    with pytest.raises(ValueError, match="b.ts: its size changes from 64x64 to 96x96"):
        read_video(tmp_path / "b.ts")
    (tmp_path / "c.ts").write_bytes(parts[0] + parts[0])
    assert len(read_video(tmp_path / "c.ts")) == 22


def test_frames_without_fields_are_left_alone(tmp_path):
    """Whatever the container says, frames that are whole are not filtered."""
    frames = woven()
    path = write_video(tmp_path / "a.mkv", frames, codec="ffv1", fmt="bgr0")
    assert np.array_equal(read_video(path), frames)

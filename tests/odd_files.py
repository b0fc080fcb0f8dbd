"""Makes videos and images as strange programs and devices write them."""

import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition
from PIL import Image

QUIET = {"x265-params": "log-level=none"}


def picture(height=30, width=50, seed=0):
    """A smooth colour picture without symmetry."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def corners(height=64, width=96):
    """Red and green above, blue and black below."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[: height // 2, : width // 2, 0] = 255
    frame[: height // 2, width // 2 :, 1] = 255
    frame[height // 2 :, : width // 2, 2] = 255
    return frame


def named(frame):
    """The colours of a frame's corners, row by row: "rgbk"."""
    h, w = frame.shape[:2]
    names = ""
    for y in (h // 4, 3 * h // 4):
        for x in (w // 4, 3 * w // 4):
            names += "rgb"[frame[y, x].argmax()] if frame[y, x].max() > 100 else "k"
    return names


def numbered(count, size=32):
    """Frames whose gray tells their index."""
    levels = 6 * np.arange(count, dtype=np.uint8)
    return levels[:, None, None, None] * np.ones((1, size, size, 3), np.uint8)


def indices(frames):
    return (frames.mean((1, 2, 3)) / 6).round().astype(int).tolist()


def write_video(
    path: Path,
    frames: np.ndarray,
    rate: int = 24,
    times: list[float] | None = None,
    last: float | None = None,
    codec: str = "libx264",
    fmt: str = "yuv420p",
    options: dict | None = None,
    container: dict | None = None,
    setup: Callable | None = None,
    sound: bool = False,
) -> Path:
    """frames: uint8 [T, H, W, 3 or 4]. times: seconds of each; last: how long the last one is."""
    base = Fraction(1, 1000) if times else Fraction(1, rate)
    with av.open(str(path), "w", container_options=container or {}) as file:
        stream = file.add_stream(codec, rate, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = fmt
        stream.time_base = stream.codec_context.time_base = base
        if setup:
            setup(stream)
        if sound:
            add_silence(file, len(frames) / rate + 2)

        for i, levels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(levels, "rgb24" if levels.shape[2] == 3 else "rgba")
            frame.time_base = base
            frame.pts = round(times[i] / base) if times else i
            file.mux(stream.encode(frame))
        packets = stream.encode()
        if last:
            packets[-1].duration = round(last / packets[-1].time_base)
        file.mux(packets)
    return path


def add_silence(file, seconds):
    stream = file.add_stream("libopus" if "webm" in file.name else "aac", 48000)
    stream.layout = "mono"
    for i in range(int(seconds * 50)):
        samples = np.zeros((1, 960), np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = 48000
        frame.pts = 960 * i
        file.mux(stream.encode(frame))
    file.mux(stream.encode())


def with_cover(path, cover, frames):
    """The cover is the first stream."""
    with av.open(str(path), "w") as file:
        first = file.add_stream("mjpeg", 1)
        first.height, first.width = cover.shape[:2]
        first.pix_fmt = "yuvj420p"
        first.disposition = Disposition.attached_pic
        stream = file.add_stream("libx264", 24)
        stream.height, stream.width = frames.shape[1:3]
        file.mux(first.encode(av.VideoFrame.from_ndarray(cover)))
        file.mux(first.encode())
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        file.mux(stream.encode())


def colours(matrix, primaries, transfer, limits=1):
    """For `setup`: codes of H.273; limits 1 for the limited range, 2 for the full one."""

    def setup(stream):
        codec = stream.codec_context
        codec.colorspace = matrix
        codec.color_primaries = primaries
        codec.color_trc = transfer
        codec.color_range = limits

    return setup


def turn(path, matrix):
    """Give an mp4 the display matrix (a, b, c, d): (x, y) is shown at (a x + c y, b x + d y)."""

    def header(a, b, c, d):
        """In 16.16 fixed point (the last entry in 2.30)."""
        one = 1 << 16
        return struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)

    content = path.read_bytes()
    upright = header(1, 0, 0, 1)
    start = content.index(upright, content.index(b"tkhd"))
    path.write_bytes(content[:start] + header(*matrix) + content[start + len(upright) :])


def profile(green=(0.29198, 0.69225, 0.04189)):
    """An ICC profile of gamma 2.2, of Display P3's primaries if `green` is not another (XYZ)."""

    def fixed(x):
        return struct.pack(">i", round(x * 65536))

    def xyz(x, y, z):
        return b"XYZ \0\0\0\0" + fixed(x) + fixed(y) + fixed(z)

    curve = b"curv" + struct.pack(">IIH", 0, 1, 563) + b"\0\0"
    tags = {
        b"desc": b"desc" + struct.pack(">II", 0, 11) + b"Display P3\0" + bytes(79),
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"wtpt": xyz(0.9642, 1, 0.8249),
        b"rXYZ": xyz(0.51512, 0.2412, -0.00105),
        b"gXYZ": xyz(*green),
        b"bXYZ": xyz(0.1571, 0.06657, 0.78407),
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
    }
    offset = 132 + 12 * len(tags)
    table = struct.pack(">I", len(tags))
    content = b""
    for name, value in tags.items():
        value += b"\0" * (-len(value) % 4)
        table += name + struct.pack(">II", offset + len(content), len(value))
        content += value
    white = fixed(0.9642) + fixed(1) + fixed(0.8249)
    head = struct.pack(">I", offset + len(content)) + b"\0\0\0\0\x02\x40\0\0mntrRGB XYZ "
    head += bytes(12) + b"acsp" + bytes(28) + white
    return head.ljust(128, b"\0") + table + content


def png_chunk(path, name, content):
    """Put a chunk into a PNG, behind the header."""
    import zlib

    chunk = struct.pack(">I", len(content)) + name + content
    chunk += struct.pack(">I", zlib.crc32(name + content))
    png = path.read_bytes()
    path.write_bytes(png[:33] + chunk + png[33:])

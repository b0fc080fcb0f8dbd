"""Packets and boxes of mp4s that extras/mp4.py wrote: their beginnings for other clips, the length
that they state.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.container import InputContainer

OTHERWISE = "begin a new clip, or give the video that this run wrote"
START_CODE = b"\0\0\0\1"  # in front of a unit of H.264, four bytes as its length in an mp4


@contextmanager
def source(path: str | Path) -> Iterator[InputContainer]:
    """An mp4 to go on from. ValueError if it is none with a video that `VideoWriter` could write.

    It may be one that a killed process has left.
    """
    path = Path(path).absolute()  # a relative a:b.mp4 would be taken for an address
    try:
        file = av.open(str(path))
    except (OSError, av.FFmpegError) as error:
        raise ValueError(
            f"cannot go on from {path}: {error.strerror or error}; {OTHERWISE}"
        ) from error
    with file:
        codecs = [stream.codec.name for stream in file.streams.video]
        if "mp4" not in file.format.name or codecs != ["h264"]:
            raise ValueError(f"cannot go on from {path}: it is no mp4 of H.264; {OTHERWISE}")
        yield file


def hold(path: Path) -> BinaryIO:
    """A video for this process alone, until the file that comes back is closed. ValueError if
    another process has it.
    """
    file = open(path, "rb")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ValueError(
            f"{path} is in use by another process, which makes this clip: wait for it, or end it"
        ) from error
    except OSError:
        pass  # a file system without locks
    return file


def known_by(path: Path, frames: int) -> str:
    """By which an mp4 is known again, under whatever name, growing or ended: a digest of its first
    packets. "" if it has fewer frames, or is no mp4 of this writer.
    """
    digest = blake2b(digest_size=8)
    count = 0
    try:
        with source(path) as file:
            for packet in islice(whole_packets(file), frames):
                digest.update(bytes(packet))
                count += 1
    except ValueError:
        return ""
    return digest.hexdigest() if count == frames else ""


def read_gops(file: InputContainer, frames: int, fps: int) -> Iterator[list[av.Packet]]:
    """The packets of a video's first frames, in the order of the file, a keyframe and what needs
    it at a time. They are as an encoder gives them: pts count frames, start codes divide units.

    ValueError if it has another rate or fewer frames, if what follows them is no keyframe, or if
    frames are missing.
    """
    tick = Fraction(1, fps)
    gop = []
    count = 0
    for packet in whole_packets(file):
        if packet.is_keyframe and gop:
            _check_complete(gop, count, file)
            yield gop
            gop = []
        if count == frames:
            break
        _count_frames(packet, file, tick)
        _put_start_codes(packet, file)
        gop.append(packet)
        count += 1
    else:
        packet = None  # the file ends here

    if count < frames:
        raise ValueError(
            f"cannot go on behind {frames} frames of {file.name}, which has {count}; "
            f"go on from {count} or fewer, where a keyframe was asked for"
        )
    if packet is not None and not packet.is_keyframe:
        raise ValueError(
            f"cannot go on behind {frames} frames of {file.name}, no keyframe follows them; "
            "go on where one was asked for"
        )
    if gop:
        _check_complete(gop, count, file)
        yield gop


def whole_packets(file: InputContainer) -> Iterator[av.Packet]:
    """All of a video that can be read: where a process was killed or a disk full, half a packet or
    half a box may follow.
    """
    packets = file.demux(video=0)
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError:
            return
        if packet is None or packet.size == 0 or packet.is_corrupt:
            return
        yield packet


def _count_frames(packet: av.Packet, file: InputContainer, tick: Fraction) -> None:
    """pts and time_base from those of the file to frames. ValueError for another rate.

    tick: how long a frame is, in seconds.
    """
    length = tick / packet.time_base  # in ticks of the file
    if packet.duration != length:
        rate = 1 / (packet.duration * packet.time_base) if packet.duration else 0
        raise ValueError(
            f"cannot go on from {file.name}, which has {float(rate):g} frames a second, "
            f"not {float(1 / tick):g}; {OTHERWISE}"
        )
    number, rest = divmod(packet.pts, length.numerator)
    packet.pts = -1 if rest else number
    packet.time_base = tick
    packet.duration = 1


def _check_complete(gop: list[av.Packet], count: int, file: InputContainer) -> None:
    """ValueError unless they are all frames up to `count`, each once, that the GOP can have."""
    numbers = sorted(packet.pts for packet in gop)
    if numbers != list(range(count - len(gop), count)):
        raise ValueError(
            f"cannot go on from {file.name}, whose frames do not follow each other at an even "
            f"pace; {OTHERWISE}"
        )


def _put_start_codes(packet: av.Packet, file: InputContainer) -> None:
    """In place of the length of each of its units, which the file has. ValueError if it's damaged.

    The muxer, which is told of an encoder, wants it so, and writes the lengths again.
    """
    content = memoryview(packet)
    at = 0
    while at + 4 <= len(content):
        end = at + 4 + int.from_bytes(content[at : at + 4], "big")
        content[at : at + 4] = START_CODE
        at = end
    if at != len(content):
        raise ValueError(f"{file.name} is damaged in frame {packet.pts}; go on from an earlier one")


def decode_frames(gop: list[av.Packet], file: InputContainer, wanted: set[int]) -> list[np.ndarray]:
    """Those frames that are in a GOP, in the order of their numbers, each uint8 [H, W, 3]."""
    if wanted.isdisjoint(packet.pts for packet in gop):
        return []
    decoder = av.CodecContext.create("h264", "r")
    decoder.extradata = _headers(file)
    pictures = []
    for packet in [*gop, None]:
        for frame in decoder.decode(packet):
            if frame.pts in wanted:
                pictures.append(frame.to_ndarray(format="rgb24", threads=1))
    return pictures


# ------------------------------------------------------------------------------------------- boxes

# Where durations stand in the boxes of a moov (ISO/IEC 14496-12, version 0), in bytes.
IN_MOVIE_TICKS = {
    (b"mvhd",): 24,
    (b"trak", b"tkhd"): 28,
    (b"trak", b"edts", b"elst"): 16,
}
IN_MEDIA_TICKS = {(b"trak", b"mdia", b"mdhd"): 24}
TIMESCALE = 20  # of mvhd and mdhd: ticks in a second


def state_length(path: Path, frames: int, fps: int) -> None:
    """Let an mp4 that FFmpeg has just ended say how long it is.

    FFmpeg only looks at what has come since the last fragment: if these are B-frames in front of an
    earlier picture, that one, which is the last to be shown, would be cut off.
    """
    with open(path, "r+b") as file:
        start = _last_box(file)
        file.seek(start)
        moov = file.read()
        assert moov[4:8] == b"moov", (path, moov[:8])
        for fields in (IN_MOVIE_TICKS, IN_MEDIA_TICKS):
            clock = _find(moov, next(iter(fields))) + TIMESCALE
            ticks = int.from_bytes(moov[clock : clock + 4], "big")
            for kinds, offset in fields.items():
                box = _find(moov, kinds)
                assert moov[box + 8] == 0, (path, kinds)
                file.seek(start + box + offset)
                file.write((-(-frames * ticks // fps)).to_bytes(4, "big"))


def _last_box(file: BinaryIO) -> int:
    """Where it begins."""
    end = file.seek(0, os.SEEK_END)
    start = 0
    while True:
        file.seek(start)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:], "big")
        assert length >= 8, (file.name, start)
        if start + length >= end:
            return start
        start += length


def _find(moov: bytes, kinds: tuple[bytes, ...]) -> int:
    """Where a box in boxes begins."""
    at = 0
    for kind in kinds:
        at += 8  # inside
        while moov[at + 4 : at + 8] != kind:
            at += int.from_bytes(moov[at : at + 4], "big")
            assert at < len(moov), kinds
    return at


# ----------------------------------------------------------------------------------------- headers


def check_headers(file: InputContainer, encoder: av.VideoCodecContext) -> None:
    """ValueError unless decoders may take the encoder's pictures for more of the file's."""
    if _headers(file) != encoder.extradata:
        raise ValueError(
            f"cannot go on from {file.name}, which another version of x264 has encoded; install "
            "the version of av that it was made with, or begin a new clip"
        )


def _headers(file: InputContainer) -> bytes:
    """The parameter sets of a video (SPS, PPS), each behind a start code: as encoders give them.

    A file keeps them with their lengths, in the record of ISO/IEC 14496-15, 5.3.3.1.
    """
    record = file.streams.video[0].codec_context.extradata or b""
    sets = b""
    at = 5
    for mask in (31, 255):  # the bits that count the SPS, and the PPS
        number = record[at] & mask if at < len(record) else 0
        at += 1
        for _ in range(number):
            end = at + 2 + int.from_bytes(record[at : at + 2], "big")
            sets += START_CODE + record[at + 2 : end]
            at = end
    return sets

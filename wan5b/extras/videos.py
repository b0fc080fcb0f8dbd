"""Video files as players show them: upright, in square pixels, in sRGB, on white. PyAV reads them.

Every frame comes with its time, by the timestamp that it bears itself: recorders of screens and
phones keep no rate, and headers guess one.
"""

import struct
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.filter import Graph
from av.stream import Disposition
from av.video.reformatter import Colorspace
from PIL import Image

from wan5b.extras import colour
from wan5b.extras.framing import resize

# Only what holds its pictures itself: no playlists, which name other files and addresses, and no
# texts, which FFmpeg would draw.
FORMATS = (
    *("mov", "matroska", "avi", "mpegts", "mpeg", "mpegvideo", "m4v", "h264", "hevc", "vvc", "av1"),
    *("obu", "ivf", "flv", "asf", "ogg", "mxf", "dv", "gif", "apng", "nut", "rm", "wtv"),
    *("yuv4mpegpipe", "pam_pipe", "jpegls_pipe", "xwd_pipe"),
)
OPTIONS = {"protocol_whitelist": "file", "format_whitelist": ",".join(FORMATS)}
PIXELS = 180_000_000  # of one picture, at most: what Pillow takes, too
UNSTATED = (0, 2, 3)  # matrices of H.273 that are none: of RGB, and said of YUV to say nothing
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own leave alpha out


Timed = tuple[av.VideoFrame, Fraction, Fraction]  # a decoded frame, its start, its length


class Shown(NamedTuple):
    """A picture and its time, in seconds since the first one."""

    start: Fraction
    until: Fraction  # from here on the next picture is as near or nearer
    picture: np.ndarray  # uint8 [H, W, 3]


def frames(path: str | Path) -> Iterator[Shown]:
    """The frames of a video file, one by one.

    Raises whatever PyAV raises, and ValueError in words that go on from "cannot read PATH: ".
    """
    with _open(path) as file:
        stream = _picture_stream(file)
        interval = Fraction(0)
        held = None  # until the next one comes, which tells how long it is shown
        for frame, start, length in _progressive(_timed(file, stream, path)):
            shown = Shown(start, start + length, _picture(frame, stream.sample_aspect_ratio))
            if held:
                _check_size(held, shown)
                interval = start - held.start
                yield held._replace(until=(held.start + start) / 2)
            held = shown
        if held is None:
            raise ValueError("there are no pictures in it")

        # The last one is shown to its end, but for half an interval: the next would be nearer then.
        length = held.until - held.start
        yield held._replace(until=held.until - min(interval, length) / 2)


def _open(path: str | Path) -> InputContainer:
    if _is_heif(path):
        raise ValueError("it is a HEIC (HEIF) picture, which is not read; save it as JPEG or PNG")
    try:
        # A relative a:b.mp4 would be taken for an address. Titles may be of any encoding.
        name = str(Path(path).absolute())
        return av.open(name, options=OPTIONS, metadata_errors="replace")
    except (av.ArgumentError, av.InvalidDataError, av.EOFError) as error:
        raise ValueError(
            "it is damaged, or of no format that is read here: "
            "videos are mp4, mov, webm, ..., images jpg, png, ..."
        ) from error


def _picture_stream(file: InputContainer) -> av.VideoStream:
    """The stream that players show, which a cover is not. ValueError if there is none."""
    stream = file.streams.best("video")
    if stream is None or stream.disposition & Disposition.attached_pic:
        raise ValueError("there is no video in it")
    if stream.codec_context is None:
        raise ValueError("its pictures are of no format that is read here")
    height = stream.codec_context.height
    width = stream.codec_context.width
    if height * width > PIXELS:
        raise ValueError(f"its pictures of {height}x{width} are too large")
    return stream


# -------------------------------------------------------------------------------------------- time


def _timed(file: InputContainer, stream: av.VideoStream, path: str | Path) -> Iterator[Timed]:
    """Decoded frames, each with its start and length in seconds, by its own timestamps.

    ValueError if a frame is damaged, or the file ends before its end.
    """
    clock = _Clock(stream)
    reach = _Reach(path, file, stream)
    try:
        for frame in _decoded(file, stream, reach):
            if not frame.is_corrupt:
                yield frame, *clock.read(frame)
            elif clock.count:  # not before the first key frame of a recording
                raise ValueError(f"its frame {clock.count} is damaged")
    except av.FFmpegError:
        reach.check_size()  # this says it better
        raise
    reach.check_size()
    reach.check_time()


def _decoded(
    file: InputContainer, stream: av.VideoStream, reach: "_Reach"
) -> Iterator[av.VideoFrame]:
    decoder = stream.codec_context
    if stream.metadata.get("alpha_mode") == "1" and decoder.name in ALPHA_DECODERS:
        decoder = av.CodecContext.create(ALPHA_DECODERS[decoder.name], "r")
    decoder.thread_type = "AUTO"

    # AVI knows times of decoding only; pictures are shown in their order.
    is_avi = file.format.name == "avi"
    decoding_times = deque()  # of the packets whose frames are to come
    for packet in file.demux():
        reach.add(packet)
        if packet.stream.index != stream.index:
            continue
        if packet.size and is_avi:
            decoding_times.append(packet.dts)
        for frame in decoder.decode(packet):
            if decoding_times:
                frame.pts = decoding_times.popleft()
            reach.frames = max(reach.frames, _end(frame))
            yield frame


def _progressive(timed: Iterator[Timed]) -> Iterator[Timed]:
    """Frames whose lines are of two times, as television's are, come as of one."""

    def layout(item: Timed) -> tuple:
        frame = item[0]
        return frame.width, frame.height, frame.format.name

    for _, alike in groupby(timed, layout):
        yield from _deinterlaced(alike)


def _deinterlaced(timed: Iterator[Timed]) -> Iterator[Timed]:
    """Of frames of one layout. The filter takes a frame and gives one, a frame later."""
    graph = None
    times = deque()
    for frame, *time in timed:
        if graph is None and frame.interlaced_frame:
            graph = _deinterlacer(frame)
        if graph is None:
            yield frame, *time
            continue
        times.append(time)
        graph.push(frame)
        for frame in _pulled(graph):
            yield frame, *times.popleft()

    if graph is not None:
        graph.push(None)
        for frame in _pulled(graph):
            yield frame, *times.popleft()


def _deinterlacer(frame: av.VideoFrame) -> Graph:
    """For frames like this one."""
    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
    )
    deinterlace = graph.add("bwdif", "mode=send_frame:deint=interlaced")
    graph.link_nodes(source, deinterlace, graph.add("buffersink")).configure()
    return graph


def _pulled(graph: Graph) -> Iterator[av.VideoFrame]:
    """What has come out of the filters so far."""
    with suppress(av.BlockingIOError, av.EOFError):
        while True:
            yield graph.pull()


def _end(item: av.Packet | av.VideoFrame) -> Fraction:
    """When a packet or a frame ends, in seconds; 0 if that is not said."""
    if item.pts is None:
        return Fraction(0)
    return (item.pts + (item.duration or 0)) * item.time_base


class _Clock:
    """The time of each frame of a stream, in seconds since the first."""

    def __init__(self, stream: av.VideoStream):
        rate = stream.average_rate or stream.guessed_rate
        self.interval = 1 / rate if rate else Fraction(0)  # of a constant rate, if it is one
        self.tick = stream.time_base
        self.count = 0  # of frames so far
        self.origin = Fraction(0)
        self.start = Fraction(0)
        self.next = Fraction(0)  # when the frame ends

    def read(self, frame: av.VideoFrame) -> tuple[Fraction, Fraction]:
        """The start of the next frame, and its length."""
        start = self.next  # of a bare stream, which has no timestamps
        if frame.pts is not None:
            stamp = frame.pts * self.tick
            if self.count == 0:
                self.origin = stamp
            elif stamp - self.origin < self.start:
                self.origin = stamp - self.next  # the clock was set back: streams were joined here
            start = self._exact(stamp - self.origin, self.count * self.interval)

        length = self._exact((frame.duration or 0) * self.tick, self.interval)
        if not length:
            length = start - self.start or self.interval or Fraction(1)
        self.start = start
        self.next = start + length
        self.count += 1
        return start, length

    def _exact(self, seconds: Fraction, expected: Fraction) -> Fraction:
        """Formats with coarse ticks round what is constant."""
        return expected if abs(seconds - expected) < self.tick else seconds


# ---------------------------------------------------------------------------------------- geometry


def _picture(frame: av.VideoFrame, ratio: Fraction | None) -> np.ndarray:
    """uint8 [H, W, 3] as players show it. ratio: width to height of a pixel."""
    has_alpha = any(component.is_alpha for component in frame.format.components)
    has_alpha = has_alpha or frame.format.name == "pal8"
    _state_matrix(frame)
    # In PyAV the threads of a conversion may outlive it, and a later fork does not survive them.
    levels = frame.to_ndarray(format="rgba" if has_alpha else "rgb24", threads=1)

    rgb = colour.from_codes(levels[..., :3], frame.color_primaries, frame.color_trc)
    if has_alpha:
        alpha = Image.fromarray(np.ascontiguousarray(levels[..., 3]))
        rgb = np.asarray(colour.on_white(Image.fromarray(np.ascontiguousarray(rgb)), alpha))

    height, width = rgb.shape[:2]
    square = max(round(width * (ratio or 1)), 1)
    if height * square > PIXELS:
        raise ValueError(f"its pictures of {height}x{square} are too large")
    if square != width:
        rgb = resize(rgb, (square, height))
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            rgb = _turned(rgb, bytes(data))
    return rgb


def _state_matrix(frame: av.VideoFrame) -> None:
    """The matrix of YUV, if the file does not say it, is by the size: as players choose it."""
    if frame.colorspace in UNSTATED and not frame.format.is_rgb:
        is_hd = frame.width >= 1280 or frame.height > 576
        frame.colorspace = Colorspace.ITU709 if is_hd else Colorspace.ITU601
    if frame.colorspace in colour.MATRICES_NOT_READ:
        kind = colour.MATRICES_NOT_READ[frame.colorspace]
        raise ValueError(f"its colours are {kind}, which is not read; convert it to BT.709 first")


def _turned(picture: np.ndarray, matrix: bytes) -> np.ndarray:
    """[H, W, 3] as a display matrix wants it: (x, y) is shown at (a x + c y, b x + d y)."""
    a, b, _, c, d, *_ = struct.unpack("=9i", matrix)
    straight = max(abs(a), abs(d))
    crossed = max(abs(b), abs(c))
    if 50 * min(straight, crossed) > max(straight, crossed):
        raise ValueError("it is turned by an odd angle, which is not read")

    right, down = a, d  # where the axes go that lie so afterwards
    if crossed > straight:
        picture = picture.swapaxes(0, 1)
        right, down = c, b
    if right < 0:
        picture = picture[:, ::-1]
    if down < 0:
        picture = picture[::-1]
    return picture


def _check_size(before: Shown, after: Shown) -> None:
    old, new = before.picture.shape, after.picture.shape
    if old != new:
        raise ValueError(
            f"its size changes from {old[0]}x{old[1]} to {new[0]}x{new[1]} "
            f"at {float(after.start):.2f} s; cut it there"
        )


# ------------------------------------------------------------------------------------------- whole?


def _boxes(path: str | Path) -> Iterator[tuple[bytes, int]]:
    """The kind of each box of an ISO file (mp4, mov, HEIC), and where it says that it ends."""
    at = 0
    with open(path, "rb") as file:
        while True:
            file.seek(at)
            head = file.read(16)
            length = int.from_bytes(head[:4], "big")
            if length == 1:
                length = int.from_bytes(head[8:], "big")
            if length < 8:
                return  # the end, or a box that goes on to it
            at += length
            yield head[4:8], at


def _is_heif(path: str | Path) -> bool:
    """Pictures in tiles, of which FFmpeg would take the first, and no video."""
    kinds = []
    for kind, _ in _boxes(path):
        kinds.append(kind)
        if kinds[0] != b"ftyp":
            return False
    return b"meta" in kinds and b"moov" not in kinds


class _Reach:
    """How far a file has been read, to tell when it ends before its end."""

    def __init__(self, path: str | Path, file: InputContainer, stream: av.VideoStream):
        self.path = path
        self.file = file
        self.stream = stream
        self.position = 0  # in bytes
        # The latest ends of frames, of their packets, and of other streams' packets, in seconds.
        self.frames = Fraction(0)
        self.packets = Fraction(0)
        self.others = Fraction(0)

    def add(self, packet: av.Packet) -> None:
        self.position = max(self.position, (packet.pos or 0) + packet.size)
        if packet.stream.index == self.stream.index:
            self.packets = max(self.packets, _end(packet))
        else:
            self.others = max(self.others, _end(packet))

    def check_size(self) -> None:
        """ValueError if the file has fewer bytes than it says, as a broken-off download has."""
        said = 0
        if "mov" in self.file.format.name:
            said = max((end for kind, end in _boxes(self.path) if kind == b"mdat"), default=0)
        elif "matroska" in self.file.format.name:
            said = _matroska_size(self.path)
        elif self.file.format.name == "avi":
            with open(self.path, "rb") as content:
                said = 8 + int.from_bytes(content.read(8)[4:], "little")

        there = Path(self.path).stat().st_size
        if there + 16 < said:
            raise ValueError(f"it is cut off: {there} of {said} bytes are there")

    def check_time(self) -> None:
        """ValueError if the frames end before the time that their file says."""
        reached = self.frames
        promised = self.packets
        if "mov" in self.file.format.name and self.stream.duration:
            ticks = (self.stream.start_time or 0) + self.stream.duration
            promised = ticks * self.stream.time_base
        elif self.file.duration and self.position < 0.9 * self.file.size:
            # The duration of all streams. It counts only when much of the file was left unread:
            # otherwise another stream is longer, or the last frame stays.
            ticks = (self.file.start_time or 0) + self.file.duration
            promised = Fraction(ticks, av.time_base)
            reached = max(reached, self.others)

        if reached + Fraction(1, 10) < promised:
            times = f"{float(reached):.2f} s of {float(promised):.2f} s"
            raise ValueError(f"it is damaged: its frames end at {times}")


def _matroska_size(path: str | Path) -> int:
    """The bytes of a Matroska or WebM file by its own account; 0 if it gives none."""
    with open(path, "rb") as file:
        head = file.read(4096)

    def number(at: int) -> tuple[int, int]:
        """A number of variable length, and where it ends. As many bytes follow as zeros lead."""
        end = at + 9 - head[at].bit_length()
        bits = 7 * (end - at)
        return int.from_bytes(head[at:end], "big") % (1 << bits), end

    length, at = number(4)  # of the header
    at += length
    if head[at : at + 4] != b"\x18\x53\x80\x67":
        return 0
    length, end = number(at + 4)
    unknown = (1 << 7 * (end - at - 4)) - 1
    return 0 if length == unknown else end + length

"""An mp4 that grows by chunks of frames, says its colours, and is whole whenever it ends.

While it grows it consists of fragments, each of which plays once it is on the disk; the end turns
them into an ordinary file. FFmpeg calls that a hybrid.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from secrets import token_hex

import av
import numpy as np
import torch
from av.codec.context import Flags
from torch import Tensor

from wan5b.extras import remux
from wan5b.extras.media import FPS
from wan5b.util import sync

# A fragment ends at each keyframe and after half a second, and is written at once, and with the
# first fragment the header, which states by how much the pictures' order delays them.
GROWING = {
    "movflags": "hybrid_fragmented+frag_keyframe+delay_moov",
    "frag_duration": "500000",  # in microseconds
    "flush_packets": "1",
}
LIBAVFORMAT = (62, 12)  # FFmpeg 8.1: 8.0 forgets the first box of a hybrid with a delayed header
REORDERED = 2  # how many packets a picture may come late, in x264's pyramid of B-frames


class VideoWriter:
    """An mp4 that grows by chunks of frames, encoded in a thread while the next are computed.

    It is written beside, under a *.partial.mp4 of its own, and renamed by `close`, which may be
    called at any time and leaves what was added. What a killed process leaves plays too, but for
    its last two seconds: x264 looks 40 frames ahead, and a fragment is half a second.
    """

    def __init__(
        self,
        path: str | Path,
        fps: int = FPS,
        keep: set[int] = frozenset(),
        overwrite: bool = False,
        beside: tuple[str, ...] = (),
        after: tuple[str | Path, int] | None = None,
    ):
        """keep: indices of frames to remember for a contact sheet. overwrite: see `close`.

        beside: suffixes of files that will be written about this clip; older ones, of the clip that
        it replaces, go just before that.
        after: (mp4, frames). The clip begins with so many frames of another of this writer, closed
        or left by a killed process, at the end or where `whole` was given. They are copied as they
        are; of those to keep, what was decoded is kept. ValueError if that can't be.
        """
        if av.library_versions["libavformat"] < LIBAVFORMAT:
            raise ValueError(f"av {av.__version__} writes videos that don't play; install av 17.1")
        self.path = Path(path).absolute()  # a relative a:b.mp4 would be taken for an address
        self.partial = self.path.with_suffix(f".{token_hex(4)}.partial.mp4")
        self.partial.touch(exist_ok=False)
        self.held = remux.hold(self.partial)  # nobody goes on from it while it grows
        self.where = self.partial  # the clip's name so far
        self.replaces = overwrite or self.path.exists()
        self.beside = beside
        self.fps = fps
        self.tick = Fraction(1, fps)  # of packets: a frame
        self.size = None  # (height, width)
        self.count = 0  # of frames encoded, or copied
        self.muxed = 0  # of frames that the encoder has given back, too
        self.intact = True  # no frame has been lost on its way to the file
        self.on_disk = 0  # of frames in fragments that have ended
        self.marks = []  # (index of a frame, what to call when all in front of it is on the disk)
        self.keep = keep
        self.kept = []
        self.file = av.open(str(self.partial), "w", container_options=GROWING)
        self.stream = self.file.add_stream("libx264", fps)
        self.encoder = None  # of the frames since the start, or since the last mark
        if after and after[1]:
            self._copy(*after)

        self.thread = ThreadPoolExecutor(1)
        self.refused: ValueError | None = None  # what ended the clip before its time
        # The encoding of the chunk added last, and of the one before; so far, of nothing.
        self.pending = self.before = self.thread.submit(lambda: None)

    # ------------------------------------------------------------------------------------- frames

    def add(
        self,
        frames: Tensor,
        whole: Callable[[], None] | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        """Append uint8 frames [T, H, W, 3]. Waits while two chunks before are not encoded yet: on a
        GPU one is still being decoded then, and what makes the next ones may be another GPU.

        whole: the first of these frames becomes a keyframe, across which no picture refers to
        another, so that `after` can go on from here. `whole` is called, in the encoding thread,
        when all in front of it is on the disk: some two seconds of video later, or by `close`. What
        it raises ends the clip like an error of the encoder. ValueError for another size.
        check: called in that thread when what was asked of a GPU so far is done. The ValueError
        that it raises ends the clip in front of these frames, whole, and is raised here or by
        `close`.
        """
        size = tuple(frames.shape[1:3])
        assert not any(side % 2 for side in size), size  # of a colour there is one for 2x2 pixels
        self.size = self.size or size
        if size != self.size:
            height, width = self.size
            raise ValueError(
                f"frames of {size[0]}x{size[1]} cannot be added to a clip of {height}x{width}; "
                "make them of its size, or begin a new clip"
            )
        # A copy from a GPU goes to pinned memory and is under way when this returns: the thread
        # waits for its event.
        host = frames.to("cpu", non_blocking=True, copy=True)
        ready = None
        if frames.is_cuda:
            ready = torch.cuda.current_stream(frames.device).record_event()
        self.before.result()
        if self.refused:
            raise self.refused
        self.before = self.pending
        self.pending = self.thread.submit(self._encode, host, ready, whole, check, self.before)

    def _encode(
        self,
        host: Tensor,
        ready: torch.cuda.Event | None,
        whole: Callable[[], None] | None,
        check: Callable[[], None] | None,
        before: Future,
    ) -> None:
        before.result()  # behind frames that are missing there are none
        if ready is not None:
            ready.synchronize()
        if whole:
            self.marks.append((self.count, whole))
            self._end_encoder()
        if check and not self.refused:
            try:
                check()
            except ValueError as error:
                self.refused = error
        if self.refused:
            return
        for frame in host.numpy():
            self._write(frame)
            if self.count in self.keep:
                self.kept.append(frame.copy())  # a view would keep its whole chunk in memory
            self.count += 1
            self._report()

    def _write(self, frame: np.ndarray) -> None:
        if self.encoder is None:
            self.encoder = self._start_encoder(*frame.shape[:2])
        rgb = av.VideoFrame.from_ndarray(frame)
        yuv = rgb.reformat(
            format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG", threads=1
        )
        yuv.pts = self.count
        self._mux(self.encoder.encode(yuv))

    # ------------------------------------------------------------------------------------ encoders

    def _start_encoder(self, height: int, width: int) -> av.VideoCodecContext:
        """The next one. Each begins with a keyframe and knows nothing of the one before, so that
        a clip that goes on from a mark is the same as one that was never stopped.
        """
        first = not self.stream.codec_context.is_open
        encoder = av.CodecContext.create("libx264", "w")
        if first:
            encoder = self.stream.codec_context
        encoder.height = height
        encoder.width = width
        encoder.framerate = self.fps
        encoder.time_base = self.tick
        encoder.flags |= Flags.global_header

        # Players take what doesn't say its colours for one thing or another: it is BT.709 (code 1
        # of matrix, primaries and transfer), of limited range (1).
        encoder.pix_fmt = "yuv420p"
        encoder.colorspace = encoder.color_primaries = encoder.color_trc = encoder.color_range = 1

        # In rows of part 16 blocks x264's macroblock tree differs from run to run (AVX512).
        if width % 256:
            encoder.options = {"x264-params": "mbtree=0"}
        if first:
            self.file.start_encoding()  # if that fails, nothing may be added or ended
        else:
            encoder.open()
        return encoder

    def _end_encoder(self) -> None:
        if self.encoder is not None and self.intact:
            self._mux(self.encoder.encode())
        self.encoder = None

    def _mux(self, packets: Iterable[av.Packet]) -> None:
        """Append packets, whose pts count frames."""
        self.intact = False
        for packet in packets:
            number = self.muxed
            is_keyframe = packet.is_keyframe
            packet.stream = self.stream
            packet.time_base = self.tick
            packet.dts = number - REORDERED
            assert packet.dts <= packet.pts, packet
            self.file.mux(packet)
            self.muxed += 1
            # With a keyframe the muxer has written all that is in front of it.
            if is_keyframe:
                self.on_disk = number
        self.intact = True

    def _report(self) -> None:
        """Call what waits for frames that are in the file by now."""
        due = [whole for mark, whole in self.marks if mark <= self.on_disk]
        if not due:
            return
        sync(self.partial)
        later = self.marks[len(due) :]
        self.marks = []  # when one raises, the others are not called
        for whole in due:
            whole()
        self.marks = later

    def _copy(self, path: str | Path, frames: int) -> None:
        """Begin with those of another clip. ValueError as by `__init__`, then nothing is left."""
        try:
            with remux.source(path) as source:
                codec = source.streams.video[0].codec_context
                self.size = (codec.height, codec.width)
                self.encoder = self._start_encoder(*self.size)
                for gop in remux.read_gops(source, frames, self.fps):
                    remux.check_headers(source, self.encoder)
                    self.kept += remux.decode_frames(gop, source, self.keep)
                    self._mux(gop)
            self.count = frames
        except BaseException:
            self.file.close()
            self.held.close()
            self.partial.unlink()
            raise

    # ----------------------------------------------------------------------------------------- end

    def close(self) -> None:
        """End the file; without frames there is none.

        Raises what encoding or a `whole` raised, and FileExistsError if another has written the
        file since the start, unless `overwrite`; the name stays *.partial.mp4 then. At last, the
        file having its name, what a `check` raised.
        """
        ended = self.thread.submit(self._end)
        self.thread.shutdown(wait=True)
        self.held.close()
        if not self.count:
            self.partial.unlink()
        self.pending.result()
        ended.result()
        if self.count:
            self._rename()
        if self.refused:
            raise self.refused

    def _rename(self) -> None:
        if self.replaces:
            # A record of another clip would be worse than none.
            for suffix in self.beside:
                self.path.with_suffix(suffix).unlink(missing_ok=True)
            os.replace(self.partial, self.path)
        else:
            self._take_name()
        self.where = self.path

    def _end(self) -> None:
        """End the file on the disk, whatever is raised on the way."""
        try:
            self._end_encoder()
        finally:
            self.file.close()
        if self.muxed:
            remux.state_length(self.partial, self.muxed, self.fps)
            sync(self.partial)
            self.on_disk = self.muxed
            self._report()

    def _take_name(self) -> None:
        """Rename it, if nobody else has taken the name since the start."""
        try:
            if self._linked():
                self.partial.unlink()
            else:
                self.path.touch(exist_ok=False)
                os.replace(self.partial, self.path)
        except FileExistsError as error:
            raise FileExistsError(
                f"{self.path} exists by now, written by another; this clip is {self.partial}"
            ) from error

    def _linked(self) -> bool:
        """Whether it has its name now beside the partial one, which some file systems can't do."""
        try:
            os.link(self.partial, self.path)
        except FileExistsError:
            raise
        except OSError:
            return False
        return True

"""An mp4 that grows by chunks of frames, says its colours, and is whole whenever it ends."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from secrets import token_hex

import av
import numpy as np
import torch
from torch import Tensor

from wan5b.media import FPS
from wan5b.util import sync


class VideoWriter:
    """An mp4 that grows by chunks of frames, encoded in a thread while the next are computed.

    It is written beside, under a *.partial.mp4 of its own, and renamed by `close`, which may be
    called at any time and leaves what was added.
    """

    def __init__(
        self,
        path: str | Path,
        fps: int = FPS,
        keep: set[int] = frozenset(),
        overwrite: bool = False,
        beside: tuple[str, ...] = (),
    ):
        """keep: indices of frames to remember for a contact sheet. overwrite: see `close`.

        beside: suffixes of files that will be written about this clip; older ones, of the clip that
        it replaces, go just before that.
        """
        self.path = Path(path).absolute()  # a relative a:b.mp4 would be taken for an address
        self.partial = self.path.with_suffix(f".{token_hex(4)}.partial.mp4")
        self.partial.touch(exist_ok=False)
        self.where = self.partial  # the clip's name so far
        self.replaces = overwrite or self.path.exists()
        self.beside = beside
        self.count = 0  # of frames encoded
        self.keep = keep
        self.kept = []
        self.file = av.open(str(self.partial), "w")
        self.stream = self.file.add_stream("libx264", fps)

        # Players take what doesn't say its colours for one thing or another: it is BT.709 (code 1
        # of matrix, primaries and transfer), of limited range (1).
        codec = self.stream.codec_context
        codec.pix_fmt = "yuv420p"
        codec.colorspace = codec.color_primaries = codec.color_trc = codec.color_range = 1

        self.thread = ThreadPoolExecutor(1)
        # The encoding of the chunk added last; so far, of nothing.
        self.pending = self.thread.submit(lambda: None)

    def add(self, frames: Tensor) -> None:
        """Append uint8 frames [T, H, W, 3]. Waits only while the chunk before is being encoded."""
        # A copy from a GPU goes to pinned memory and is under way when this returns: the thread
        # waits for its event.
        host = frames.to("cpu", non_blocking=True, copy=True)
        ready = torch.cuda.current_stream().record_event() if frames.is_cuda else None
        self.pending.result()
        self.pending = self.thread.submit(self._encode, host, ready)

    def _encode(self, host: Tensor, ready: torch.cuda.Event | None) -> None:
        if ready is not None:
            ready.synchronize()
        for frame in host.numpy():
            self._write(frame)
            if self.count in self.keep:
                self.kept.append(frame.copy())  # a view would keep its whole chunk in memory
            self.count += 1

    def _write(self, frame: np.ndarray) -> None:
        if self.count == 0:
            self.stream.height, self.stream.width = frame.shape[:2]
            # In rows of part 16 blocks x264's macroblock tree differs from run to run (AVX512).
            if self.stream.width % 256:
                self.stream.codec_context.options = {"x264-params": "mbtree=0"}
            self.file.start_encoding()  # if that fails, nothing may be added or ended
        rgb = av.VideoFrame.from_ndarray(frame)
        yuv = rgb.reformat(
            format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG", threads=1
        )
        yuv.pts = self.count
        self.file.mux(self.stream.encode(yuv))

    def close(self) -> None:
        """End the file; without frames there is none.

        Raises what encoding raised, and FileExistsError if another has written the file since the
        start, unless `overwrite`; the name stays *.partial.mp4 then.
        """
        self.thread.shutdown(wait=True)
        if self.count:
            self.file.mux(self.stream.encode())
        self.file.close()
        if not self.count:
            self.partial.unlink()
        self.pending.result()
        if not self.count:
            return

        sync(self.partial)
        if self.replaces:
            # A record of another clip would be worse than none.
            for suffix in self.beside:
                self.path.with_suffix(suffix).unlink(missing_ok=True)
            os.replace(self.partial, self.path)
        else:
            self._take_name()
        self.where = self.path

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

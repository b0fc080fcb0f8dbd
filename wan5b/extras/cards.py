"""Two GPUs: what one makes is brought to the other, or to the host, and neither waits for it.

A card's work is a queue. Copying between two cards as usual makes each queue wait for all that is
in the other's, so that the DiT would begin a chunk when the decoder has ended one.
"""

from argparse import Namespace
from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wan5b.extras.media import to_frames


@cache
def side_streams(source: torch.device, target: torch.device) -> tuple[torch.cuda.Stream, ...]:
    """On either card one in which nothing runs but copies from the first to the second."""
    return torch.cuda.Stream(source), torch.cuda.Stream(target)


def carry(x: Tensor, place: torch.device) -> Tensor:
    """x.to(place). Between two cards neither queue waits for what was put into the other later, nor
    the source's for anything that the target has to do.
    """
    between_cards = x.is_cuda and place.type == "cuda" and x.device != place
    if not between_cards:
        return x.to(place)

    leaving, arriving = side_streams(x.device, place)
    leaving.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(leaving), torch.cuda.stream(arriving):
        there = x.to(place, non_blocking=True)
    x.record_stream(leaving)

    target = torch.cuda.current_stream(place)
    target.wait_stream(arriving)
    there.record_stream(target)
    return there


def carried(chunks: Iterable[Tensor], place: torch.device) -> Iterator[Tensor]:
    """Every chunk at a place, as it is asked for."""
    return (carry(chunk, place) for chunk in chunks)


def place_of_vae(args: Namespace) -> str:
    """The device of the VAE by a script's options."""
    return args.vae_device or args.device


def place_of(network: torch.nn.Module) -> torch.device:
    """The device of its parameters, a card by its number."""
    return next(network.parameters()).device


class Decoded(NamedTuple):
    """A chunk's frames on their way to host memory."""

    frames: Tensor  # uint8 [T, H, W, 3], on the host; there once `ready` has come
    finite: Tensor  # whether all pixels are; likewise
    ready: torch.cuda.Event | None  # None: they are there

    def wait(self) -> np.ndarray:
        """The frames. FloatingPointError for pixels that are not finite."""
        if self.ready is not None:
            self.ready.synchronize()
        if not self.finite:
            text = "the picture is not finite (damaged weights, or float16?); no video"
            raise FloatingPointError(text)
        return self.frames.numpy()


def decode_frames(vae, chunk: Tensor, state) -> tuple[Tensor, Tensor]:
    """The frames of a chunk [1, C, T, H, W], the next of a stream: uint8 [T, H, W, 3], where the
    VAE is, and whether all pixels are finite, on its way to the host like what follows it there.

    To wait for it here would leave a second GPU without work meanwhile.
    """
    pixels = vae.decode_chunk(chunk, state)
    finite = pixels.isfinite().all().to("cpu", non_blocking=True)
    return to_frames(pixels[0]), finite


def decode(vae, chunk: Tensor, state) -> Decoded:
    """Decode a chunk [1, C, T, H, W], the next of a stream: on a GPU this is under way then."""
    frames, finite = decode_frames(vae, chunk, state)
    host = frames.to("cpu", non_blocking=True)  # from a GPU into pinned memory
    ready = None
    if frames.is_cuda:
        ready = torch.cuda.current_stream(frames.device).record_event()
    return Decoded(host, finite, ready)

"""The finished chunks of which a rollout's memory is made, to make it again: under another text
(recache), or in another process (a long video that was interrupted).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from wan5b.distill import commit
from wan5b.kvcache import KVCache


class Commit(NamedTuple):
    """Frames that were taken into the cache together."""

    start: int  # index of the first latent frame
    latents: Tensor  # [B, C, T, H, W]
    context: Tensor  # the text at that
    chunk: int  # the generated chunk whose text that was
    sigma: float | Tensor = 0.0  # of the latents, float or [B, T]: above 0 without a clean pass


class Watched:
    """A model that remembers what it was last shown."""

    def __init__(self, model: Callable):
        self.model = model
        self.x = None
        self.sigma = None

    def __call__(self, x: Tensor, sigma: float | Tensor, context: Tensor, **options) -> Tensor:
        self.x = x
        self.sigma = sigma
        return self.model(x, sigma, context, **options)


class Past:
    """What the memory of the next chunk depends on, as the list of commits that lead to it.

    A cache holds a window's keys, which depend, layer by layer, on what their frames saw: on
    `layers` windows of frames in all. These, and the sink's, are kept; earlier ones don't count.
    """

    def __init__(self, layers: int, window: int | None, sink: int):
        """layers: of the network, to make the memory again to the bit; 1 where `recache` alone
        needs the frames. Without a window all frames are kept.
        """
        self.window = window
        self.sink = sink
        self.reach = layers * (window - sink) if window else None
        self.commits: list[Commit] = []
        self.frames = 0  # latent frames so far
        self.chunks = 0  # generated ones so far

    def add(self, latents: Tensor, context: Tensor, sigma: float | Tensor = 0.0) -> None:
        """Frames that the cache takes in next, with the text of the chunk at hand.

        sigma: their level, where it is the last step that is taken in, not a clean pass.
        """
        self.commits.append(Commit(self.frames, latents.detach(), context, self.chunks, sigma))
        self.frames += latents.shape[2]
        if self.reach:
            self.commits = self._since(self.frames - self.reach)

    def taking_in(
        self,
        made: Iterable[Tensor],
        cache: KVCache,
        inside: Tensor | None,
        watched: Watched | None = None,
    ) -> Iterator[Tensor]:
        """The chunks of a rollout [B, C, T, H, W], each of which is added before it is handed on.

        inside: the prefix that is the first frames of the first one, if any. watched: the model,
        if the cache keeps what it was last shown, for want of a clean pass.
        """
        for x0 in made:
            if watched:
                self.add(watched.x, cache.context, watched.sigma)
            else:
                self.add(x0 if inside is None else torch.cat([inside, x0], 2), cache.context)
            self.chunks += 1
            inside = None
            yield x0

    def refill(self, generator: Callable, cache: KVCache) -> None:
        """Make the cache's memory again by the same commits, with the same gaps between them."""
        for made in self.commits:
            cache.rewind(made.start)
            commit(generator, made.latents, made.context, cache, made.sigma)

    def recache(self, generator: Callable, cache: KVCache, context: Tensor) -> None:
        """Run sink and window again under another text (LongLive, arXiv 2509.22622): the next chunk
        then sees frames as if they had been made with it.
        """
        start = self.frames - (self.window - self.sink) if self.window else 0
        seen = self._since(start)
        self.commits = [made._replace(context=context, chunk=self.chunks) for made in seen]
        self.refill(generator, cache)

    def recached(
        self, contexts: Iterable[Tensor], generator: Callable, cache: KVCache
    ) -> Iterator[Tensor]:
        """The texts of the next chunks, asked for as each begins: behind `recache`, where the text
        is not the same tensor as before.
        """
        for context in contexts:
            if self.commits and context is not self.commits[-1].context:
                self.recache(generator, cache, context)
            yield context

    def _since(self, frame: int) -> list[Commit]:
        """The commits with frames of the sink, or from a frame on."""
        kept = []
        for made in self.commits:
            if made.start < self.sink or made.start + made.latents.shape[2] > frame:
                kept.append(made)
        return kept

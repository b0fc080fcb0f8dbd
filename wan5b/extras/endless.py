"""Videos without an end, for the live page: what options come to, texts on the way, frames by the
chunk.
"""

import threading
import time
from argparse import Namespace
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from itertools import chain, groupby, repeat
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wan5b.dit import DiTConfig
from wan5b.extras import fp8_attention
from wan5b.extras.cards import carried, decode, place_of
from wan5b.extras.files import parse_size
from wan5b.extras.framing import fit
from wan5b.extras.graphs import Graphs
from wan5b.extras.plan import (
    check_numbers,
    choose,
    describe,
    how_sampled,
    look_at_weights,
    note,
    note_weights,
)
from wan5b.extras.recipes import Recipe
from wan5b.extras.sampling import draw_noise, generate
from wan5b.extras.studio import Wish

WINDOW = 21  # latent frames, where the recipe has none: what clips of 81 frames have
TEXTS = 32  # whose contexts are kept
PATIENCE = 0.04  # seconds that a chunk waits for texts on the way: less than a chunk later


class Job(NamedTuple):
    """All that live.py needs to load networks and make videos."""

    cfg: DiTConfig
    options: dict  # keyword arguments of load_dit: loras, part
    dtype: torch.dtype  # of the networks
    size: tuple[int, int]  # height and width in pixels
    recipe: Recipe
    name: str  # of the recipe
    samplers: dict[bool, dict]  # arguments of `generate`: without, with an image


def plan(args: Namespace) -> Job:
    """What the options come to. ValueError for whatever is wrong with them, before loading."""
    dtype = check_numbers(args)
    weights = look_at_weights(args)
    found = choose(args, weights)
    if not found.recipe.causal:
        way_out = "give causal weights (LongLive 2, an export of dmd, ode or ar), or --mode few"
        raise ValueError(
            f"{found.name} ({found.why}) makes the whole clip at once, so it can't be shown "
            f"while it is made; {way_out}"
        )
    recipe = found.recipe
    fp8_attention.check(args, recipe.causal, weights.cfg.head_dim, dtype)
    if not recipe.window:
        recipe = replace(recipe, window=max(WINDOW, recipe.sink + 2 * recipe.chunk))
        text = f"no window in {found.name}, but the video has no end"
        note(f"{text}: a chunk sees {recipe.window} latent frames (--window)")

    samplers = {False: endless(recipe, image=False, recache=args.recache)}
    if recipe.image != "none":
        samplers[True] = endless(recipe, image=True, recache=args.recache)
    note_weights(args, weights, found)
    print(f"{found.name} ({found.why}): {describe(recipe, samplers[False])}")
    size = parse_size(args.size)
    return Job(weights.cfg, weights.options, dtype, size, recipe, found.name, samplers)


def endless(recipe: Recipe, image: bool, recache: bool) -> dict:
    """Arguments of `generate` for a video without an end; chunks: the first one's, all others'."""
    asked = Namespace(frames=None, image="an image" if image else None)
    sampler = how_sampled(asked, recipe, 1 if image else 0)
    sampler |= {"endless": True, "recache": recache}
    return sampler | {"chunks": [sampler["chunks"][0], recipe.chunk]}


class Contexts:
    """Contexts of texts, made in a thread of their own: a video runs on meanwhile.

    One text is one tensor, by which the rollout knows it again.
    """

    def __init__(self, encode: Callable[[str], Tensor]):
        self.encode = encode
        self.made: OrderedDict[str, Future] = OrderedDict()
        self.lock = threading.Lock()
        self.thread = ThreadPoolExecutor(1, "text")

    def _future(self, text: str) -> Future:
        with self.lock:
            future = self.made.get(text)
            if future is None:
                future = self.made[text] = self.thread.submit(self.encode, text)
            self.made.move_to_end(text)
            while len(self.made) > TEXTS:
                self.made.popitem(last=False)
            return future

    def begin(self, text: str) -> None:
        """Make it, if it is not there; this does not wait."""
        self._future(text)

    def ready(self, text: str, until: float) -> bool:
        """Whether it is there, or will be at that time by time.monotonic. It must have been begun:
        of more than TEXTS on the way the oldest are given up.
        """
        with self.lock:
            future = self.made.get(text)
        if future is None:
            return False
        done, _ = wait([future], max(until - time.monotonic(), 0))
        return bool(done)

    def of(self, text: str) -> Tensor:
        """Waits for it. Raises what the encoder raised."""
        try:
            return self._future(text).result()
        except Exception:
            with self.lock:
                self.made.pop(text, None)  # another time it may go well: memory may be free then
            raise

    def close(self) -> None:
        self.thread.shutdown(cancel_futures=True)


class Endless:
    """make(wish) of a Studio, by a model."""

    def __init__(
        self,
        job: Job,
        model,
        vae: tuple,
        contexts: Contexts,
        new_cache,
        interpolate: int = 1,
        anew: bool = False,
    ):
        """vae: encoder and decoder, see `split_vae`, on another GPU than the model if both are to
        work at once: see `is_ahead`. new_cache: see `generate`. interpolate: chunks over which a
        new prompt takes the old one's place. anew: a new prompt begins a video of its own instead.
        """
        self.job = job
        self.model = model
        self.encoder, self.decoder = vae
        self.contexts = contexts
        self.new_cache = new_cache
        self.interpolate = interpolate
        self.anew = anew

    @torch.no_grad()
    def __call__(self, wish: Wish) -> Iterator[np.ndarray]:
        """Frames uint8 [T, H, W, 3], chunk by chunk, for ever.

        FloatingPointError for pixels that are not finite; ValueError for an image that can't be
        taken.
        """
        job = self.job
        has_image = wish.image is not None
        if has_image and True not in job.samplers:
            raise ValueError(f"{job.name} is for text only: leave the image out")
        prefix = None
        if has_image:
            pixels = fit(wish.image, *job.size)[None].to(place_of(self.encoder))
            prefix = self.encoder.encode(pixels).to(place_of(self.model))

        sampler = job.samplers[has_image]
        first, rest = sampler["chunks"]
        size = (job.cfg.in_dim, job.size[0] // 16, job.size[1] // 16)
        waiting = deque()  # chunks that are being decoded, and the versions of their prompts
        # Each of several videos has noise of its own: the same again would look alike.
        for seed, texts in enumerate(self.videos(wish), wish.seed):
            noise = draw_noise(seed, chain([first], repeat(rest)), size)
            own = {"prefix": prefix, "seed": seed, "new_cache": self.new_cache}
            latents = generate(self.model, noise, texts, **sampler, **own)
            state = self.decoder.stream()
            for chunk in carried(latents, place_of(self.decoder)):
                waiting.append((decode(self.decoder, chunk, state), wish.in_force))
                if len(waiting) > self.is_ahead:
                    decoded, wish.version = waiting.popleft()
                    yield decoded.wait()

    @property
    def is_ahead(self) -> bool:
        """Whether the next chunk is begun before this one's frames are waited for: with a GPU for
        each. One alone would be no faster, and prompts would be a chunk later.
        """
        places = {place_of(self.model), place_of(self.decoder)}
        return len(places) == 2 and all(place.type == "cuda" for place in places)

    def videos(self, wish: Wish) -> Iterator[Iterator[Tensor]]:
        """The contexts of a video's chunks: of one without an end, or of one after the other, each
        until the prompt changes.
        """
        texts = self.texts(wish)
        if self.anew:
            # A prompt is one tensor as long as it stays, so another tensor is another prompt.
            yield from (video for _, video in groupby(texts, key=id))
        else:
            yield texts

    def texts(self, wish: Wish) -> Iterator[Tensor]:
        """The context of each chunk. A new one takes the old one's place at once, or bit by bit."""
        over = self.interpolate
        prompt = wish.prompt()
        shown = target = old = self.contexts.of(prompt)
        step = over  # of `over` from the old one to the target
        while True:
            yield shown
            # However many prompts are on the way: a chunk waits for all of them together.
            ready = partial(self.contexts.ready, until=time.monotonic() + PATIENCE)
            newest = wish.prompt(ready)
            if newest != prompt:
                prompt = newest
                old = shown
                target = self.contexts.of(prompt)
                step = 0
            if step < over:
                step += 1
            # At the end it is the text's own tensor, by which the rollout knows it again.
            shown = target if step == over else torch.lerp(old, target, step / over)

    def warm_up(self) -> float:
        """Run until all that is made once is made (compiled code, CUDA graphs) -> seconds that a
        chunk takes then.
        """
        compiles = isinstance(self.model.compute, Graphs)
        turns = 2 * -(-self.job.recipe.window // self.job.recipe.chunk) + 3 if compiles else 3
        for has_image in self.job.samplers:
            image = np.full((1, *self.job.size, 3), 128, np.uint8) if has_image else None
            wish = Wish("a gray wall", 0, image, threading.Condition())
            chunks = self(wish)
            took = []
            for _ in range(turns):
                begun = time.monotonic()
                next(chunks)
                took.append(time.monotonic() - begun)
            chunks.close()
            if not has_image:
                seconds = float(np.median(took[-max(len(took) // 2, 1) :]))
        return seconds

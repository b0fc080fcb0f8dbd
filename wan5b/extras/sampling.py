"""How clips are sampled: a table of modes, and the latents of clips, piece by piece.

Used by sample.py, by the sample videos of train.py and by the demo.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, islice, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wan5b.distill import behind, guided, rollout, split_prefix
from wan5b.extras.past import Past, Watched
from wan5b.flow import solve
from wan5b.kvcache import KVCache
from wan5b.util import rng


class Mode(NamedTuple):
    """How a model makes clips."""

    causal: bool  # chunk by chunk over a cache; else the whole clip at once
    guided: bool  # by classifier-free guidance: two branches a forward
    solver: str  # of flow.solve; "renoise" goes down the levels that few-step models are made for


MODES = {
    "few": Mode(True, False, "renoise"),
    "many": Mode(True, True, "unipc"),
    "bidirectional": Mode(False, True, "unipc"),
    "few-bidirectional": Mode(False, False, "renoise"),
}


def draw_noise(
    seed: int, chunks: Iterable[int], size: tuple[int, int, int], first: int = 0
) -> Iterator[Tensor]:
    """A clip's noise [1, C, T, H, W], float32 on the CPU, drawn chunk by chunk as it is asked for.

    chunks: frames of each, from the chunk `first` on, on whose index alone its noise depends. size:
    (C, H, W) of the latents.
    """
    channels, height, width = size
    for index, frames in enumerate(chunks, first):
        shape = (1, channels, frames, height, width)
        yield torch.randn(shape, generator=rng("cpu", seed, "noise", index))


def generate(
    model: Callable,
    noise: Tensor | Iterable[Tensor],
    context: Tensor | Iterable[Tensor],
    sigmas: list[float],
    chunks: list[int],
    *,
    causal: bool,
    solver: str,
    guidance: float | None = None,
    prefix: Tensor | None = None,
    window: int | None = None,
    sink: int = 0,
    sink_rope: str = "absolute",
    seed: int = 0,
    prefix_inside: bool = False,
    cuts: dict[int, int] | None = None,
    recache: bool = False,
    endless: bool = False,
    past: Past | None = None,
    draws: torch.Generator | None = None,
    sigmas_after: list[float] | None = None,
    clean_pass: bool = True,
    new_cache: Callable = KVCache,
) -> Iterator[Tensor]:
    """Latents [B, C, T, H, W] of clips, piece by piece: the prefix first, if any, then every chunk
    as it is finished.

    - model: a WanDiT.
    - noise, sigmas, chunks, prefix: as in `rollout`. Not causal: all chunks are made at once.
    - context [B, L, D] of the prompts, or [2B, L, D], with the unconditional rows behind: needed
      with guidance. Causal: or one for every chunk, with just the rows needed, where chunks of one
      text have the same tensor: a list, or an iterable that is asked when the chunk begins.
    - solver: one of flow.SOLVERS; seed: of the noise that "renoise" adds, or the generator `draws`.
    - guidance: scale of CFG, for all chunks; None or 1: there is none.
    - new_cache: called as KVCache is; may return one that was used before.

    Only where causal:
    - window, sink, sink_rope: of the cache; prefix_inside, cuts: as in `rollout`.
    - recache: where the text changes, the window is run again under the new one.
    - endless: noise that never ends. Needs a window; chunks: the sizes that occur.
    - past: takes what the memory is made of; of one that has chunks the video goes on, with noise
      and contexts of those that are left, and no prefix.
    - sigmas_after: levels of all chunks but the video's first; clean_pass: as in `rollout`.
    """
    going_on = past is not None and past.frames > 0
    assert not (going_on and (prefix is not None or cuts)), "a video goes on as it is"
    assert window or not endless, "a video without an end needs a window"
    if isinstance(context, list | tuple) and not endless:
        assert len(context) == len(chunks), f"{len(context)} contexts for {len(chunks)} chunks"
    if prefix is not None:
        yield prefix

    # At guidance 1 the unconditional branch counts for nothing: leaving it out halves the work.
    branches = 1 if guidance in (None, 1) else 2
    field = model if branches == 1 else guided(model, guidance)

    # The first chunk's noise and text tell sizes and place.
    piece, pieces = peek(noise.split(chunks, dim=2) if isinstance(noise, Tensor) else noise)
    rows = branches * len(piece)
    text, texts = peek(repeat(context[:rows]) if isinstance(context, Tensor) else context)
    assert len(text) == rows, f"{len(text)} rows of text, not {rows}"
    fresh = drawn_from(draws or rng(text.device, seed, "renoise"))

    # The whole clip at once.
    if not causal:
        field = field if prefix is None else behind(field, prefix)
        x = torch.cat(list(pieces), 2).to(text.device)
        yield solve(partial(field, context=text), x, sigmas, solver, partial(fresh, 0))
        return

    # Or chunk by chunk, over a cache with room for all that a chunk sees.
    past = past or Past(1, window, sink)
    given = 0 if prefix is None else prefix.shape[2]
    total = past.frames + given + sum(chunks)
    capacity = window if endless else min(window or total, total)
    sizes = (rows, capacity, model.cfg.tokens_per_frame(*piece.shape[3:]))
    cache = new_cache(model.cfg, *sizes, window, sink, text.device, text.dtype, sink_rope)
    cache.reset()

    # Without a clean pass it holds what the last steps saw, which is then what makes it again.
    watched = None if clean_pass else Watched(field)
    field = watched or field

    # What it holds is made again where the video goes on, or anew where the text changes.
    if going_on:
        past.refill(field, cache)
    if recache:
        texts = past.recached(texts, field, cache)

    # Past takes in what the cache does: first a prefix in front, which `rollout` commits.
    inside = prefix if prefix_inside else None
    if prefix is not None and not prefix_inside:
        for part in split_prefix(prefix, chunks):
            past.add(part, text)
    how = {"renoise": fresh, "prefix": prefix, "prefix_inside": prefix_inside, "cuts": cuts}
    how["clean_pass"] = clean_pass
    if sigmas_after:
        sigmas = chain([] if past.chunks else [sigmas], repeat(sigmas_after))
    made = rollout(field, pieces, texts, sigmas, chunks, cache, solver=solver, **how)
    # Asked for one more than there are, it would commit the last one for nothing.
    made = made if endless else islice(made, len(chunks))
    yield from past.taking_in(made, cache, inside, watched)


def drawn_from(draws: torch.Generator) -> Callable:
    """The noise that "renoise" adds, as `rollout` asks for it, drawn one after the other."""

    def fresh(chunk: int, step: int, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=draws, device=like.device)

    return fresh


def peek(items: Iterable) -> tuple[Any, Iterator]:
    """The first of some items, of which there is one at least, and all of them."""
    items = iter(items)
    first = next(items)
    return first, chain([first], items)

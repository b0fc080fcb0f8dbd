"""How clips are sampled: a table of modes, and the latents of clips, piece by piece.

Used by sample.py, by the sample videos of train.py and by the demo.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from wan5b.distill import behind, guided, rollout
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


def generate(
    model: Callable,
    noise: Tensor,
    context: Tensor | list[Tensor],
    sigmas: list[float],
    chunks: list[int],
    *,
    causal: bool,
    solver: str,
    guidance: float | None = None,
    prefix: Tensor | None = None,
    window: int | None = None,
    sink: int = 0,
    seed: int = 0,
    prefix_inside: bool = False,
    cuts: dict[int, int] | None = None,
    new_cache: Callable = KVCache,
) -> Iterator[Tensor]:
    """Latents [B, C, T, H, W] of clips, piece by piece: the prefix first, if any, then every chunk
    as it is finished.

    - model: a WanDiT.
    - noise, sigmas, chunks, prefix: as in `rollout`. Not causal: all chunks are made at once.
    - context [B, L, D] of the prompts. Causal: or a list of one for every chunk, where chunks of
      one text have the same tensor. It may have the unconditional rows behind, [2B, L, D]; with
      guidance it must.
    - solver: one of flow.SOLVERS; seed: of the noise that "renoise" adds.
    - guidance: scale of CFG, for all chunks; None or 1: there is none.
    - window, sink: of the cache, in latent frames; prefix_inside, cuts: as in `rollout`. All four
      only where causal.
    - new_cache: called as KVCache is; may return one that was used before.
    """
    clean = 0
    if prefix is not None:
        yield prefix
        clean = prefix.shape[2]

    # At guidance 1 the unconditional branch counts for nothing: leaving it out halves the work. A
    # text that comes again is the same tensor again, since the cache knows it by that.
    texts = context if isinstance(context, list) else [context]
    field = model
    if guidance in (None, 1):
        conditional = {id(text): text[: len(noise)] for text in texts}
        texts = [conditional[id(text)] for text in texts]
    else:
        field = guided(model, guidance)
    first = texts[0]
    draws = rng(first.device, seed, "renoise")

    def fresh(chunk: int, step: int, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=draws, device=like.device)

    # The whole clip at once.
    if not causal:
        field = field if prefix is None else behind(field, prefix)
        x = noise.to(first.device)
        yield solve(partial(field, context=first), x, sigmas, solver, partial(fresh, 0))
        return

    # Chunk by chunk, over a cache for as many rows as the context has.
    total = clean + noise.shape[2]
    tokens = model.cfg.tokens_per_frame(*noise.shape[3:])
    sizes = (len(first), min(window or total, total), tokens)
    cache = new_cache(model.cfg, *sizes, window, sink, first.device, first.dtype)
    cache.reset()
    given = (field, noise, texts if isinstance(context, list) else first, sigmas, chunks, cache)
    options = {"renoise": fresh, "prefix": prefix, "prefix_inside": prefix_inside, "cuts": cuts}
    # No more than there are: asked for another, the rollout would commit the last one too.
    yield from islice(rollout(*given, solver=solver, **options), len(chunks))

"""The rollout, used alike by training and sampling, and the distillation losses. Models come as
arguments.

A generator is anything called as model(x, sigma, context, cache=...) -> v (`replay`: and
chunks=...).
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, repeat

import torch
from torch import Tensor

from wan5b.flow import add_noise, solve, x0_from_v
from wan5b.kvcache import KVCache, chunk_sizes

# ------------------------------------------------------------------------------------------ rollout


def rollout(
    generator: Callable,
    noise: Tensor | Iterable[Tensor],
    context: Tensor | Iterable[Tensor],
    sigmas: list[float] | Iterator[list[float]],
    chunks: list[int],
    cache: KVCache,
    *,
    exit_step: int | None | Iterator[int] = None,
    renoise: Callable | None = None,
    prefix: Tensor | None = None,
    prefix_inside: bool = False,
    committed: Tensor | None = None,
    cuts: dict[int, int] | None = None,
    solver: str = "",
    trace: list[Tensor] | None = None,
    clean_pass: bool = True,
) -> Iterator[Tensor]:
    """Generate chunk by chunk over a KV cache (Self Forcing, arXiv 2506.08009, algorithms 1 and 2).

    Yields every finished chunk x0 [B, C, T_chunk, H, W]. The cache takes it in (one pass at sigma
    0, no grad) when the next one is asked for, so it must not be changed in place.

    - generator: a WanDiT, or what is called like one (`guided`, `behind`); the same for all chunks.
    - noise [B, C, T, H, W] covers the generated frames, cut into chunks. It may lie on the CPU,
      from which it is moved chunk by chunk. Or an iterable of every chunk's, drawn when the chunk
      begins; without an end there is no end to the video.
    - context [B, L, D], or one for every chunk: a list, or an iterable that is asked when the chunk
      begins; the cache then holds the chunks before. sigmas: the levels, falling, the last one 0;
      or an iterator of every chunk's.
    - chunks: frames of each; with noise of no known end, the sizes that occur.
    - exit_step: index of the level whose x0 is the result (None: the last above 0), or an iterator
      of every chunk's. Grad, where enabled, flows through that level's forward alone; none crosses
      chunks, since committed keys carry none.
    - renoise(chunk index, step index, like) -> noise for the next level; default: the global
      generator's.
    - prefix: clean frames [B, C, T', H, W] (an image, a video to continue) committed ahead of the
      first chunk. prefix_inside: they are the first frames of that chunk instead, made and
      committed with it.
    - committed: frames [B, C, T, H, W] that the cache takes in behind each chunk in place of those
      generated: with a real clip's each chunk stands behind real frames, whatever was generated.
    - cuts: chunk index -> how many RoPE positions a scene cut leaves out there (`KVCache.cut`).
    - solver: "unipc" or "euler" integrates the flow through all levels instead of re-noising.
    - trace: a list that takes the input of every chunk's exit level, for `replay`.
    - clean_pass: False commits the keys of the last level's forward in its place: see `keep_last`.
    """
    if isinstance(noise, Tensor):
        assert sum(chunks) == noise.shape[2], f"chunks {chunks}, noise of {noise.shape[2]} frames"
        noise = noise.split(chunks, dim=2)
    renoise = renoise or (lambda chunk, step, like: torch.randn_like(like))
    ways = sigmas if isinstance(sigmas, Iterator) else repeat(sigmas)
    exits = exit_step if isinstance(exit_step, Iterator) else repeat(exit_step)
    renoises = solver in ("", "renoise")
    whole_way = exit_step is None and clean_pass
    assert renoises or whole_way, f"{solver} goes through all levels and ends with a clean pass"
    assert clean_pass or committed is None, "without a clean pass a chunk's own keys are kept"
    others = None if committed is None else iter(committed.split(chunks, dim=2))
    if trace is not None:
        # What `replay` can run again: a prefix in front, one text, an exit level.
        assert renoises, f"nothing to replay of solver {solver}"
        assert not prefix_inside, "a replay takes its prefix in front"
        assert isinstance(context, Tensor), "a replay takes one text"
    if isinstance(context, list | tuple):
        assert len(context) == len(chunks), f"{len(context)} contexts for {len(chunks)} chunks"
    texts = repeat(context) if isinstance(context, Tensor) else iter(context)
    text = next(texts)  # the prefix is committed under it as well
    texts = chain([text], texts)

    inside = prefix if prefix_inside else None
    if prefix is not None and prefix.shape[2] and not prefix_inside:
        for part in split_prefix(prefix, chunks):
            commit(generator, part, text, cache)

    # Whichever ends first ends the video: noise and texts may have no end, the others need none.
    each = zip(noise, texts, ways, exits, strict=False)
    for index, (x, text, levels, leave) in enumerate(each):
        leave = len(levels) - 2 if leave is None else leave
        assert 0 <= leave < len(levels) - 1, f"exit_step {leave} of levels {levels}"
        x = x.to(text.device)
        if cuts and index in cuts:
            cache.cut(x.shape[2], cuts[index])
        cache.use_text(text)
        model = generator if inside is None else behind(generator, inside)
        field = partial(_velocity, model, text, cache)
        if renoises:
            # Down to the exit level without grad, then that level, with grad where it is enabled.
            fresh = partial(renoise, index)
            with torch.no_grad():
                x = solve(field, x, levels[: leave + 1], "renoise", fresh)
            if trace is not None:
                trace.append(x)
            x0 = x0_from_v(x, field(x, levels[leave]), levels[leave])
        else:
            x0 = solve(field, x, levels, solver)
        yield x0
        if clean_pass:
            clean = next(others) if others else x0
            whole = clean if inside is None else torch.cat([inside, clean], 2)
            commit(generator, whole, text, cache)
        else:
            keep_last(field, x0, levels[leave:-1], partial(fresh, leave), cache)
        inside = None


def replay(
    generator: Callable, context: Tensor, sigma: float | Tensor, trace: list[Tensor], cache: KVCache
) -> Tensor:
    """The exit levels of the rollout that filled the cache again, now with grad -> x0 [B, C, T, H,
    W].

    One forward for all chunks: each one's keys are its own and the committed ones, which are there
    and carry no grad. So the rollout itself runs without grad, its loss, a function of x0 alone, is
    differentiated first, and sharded weights are gathered, and their gradients reduced, once.

    trace: of the last chunks, or of all. sigma: their levels, [1, T] if they differ. The cache must
    still hold all that these chunks saw.
    """
    x = torch.cat(trace, 2)
    chunks = [part.shape[2] for part in trace]
    return x0_from_v(x, generator(x, sigma, context, chunks=chunks, cache=cache), sigma)


def _velocity(generator: Callable, context: Tensor, cache: KVCache, x: Tensor, sigma: float):
    return generator(x, sigma, context, cache=cache)


def split_prefix(prefix: Tensor, chunks: list[int]) -> tuple[Tensor, ...]:
    """The parts in which a prefix in front of the first chunk is committed: chunks too, of which
    the first may be smaller. 7 frames in front of chunks of 3 are 1, 3, 3.
    """
    sizes = chunk_sizes(prefix.shape[2], max(chunks), prefix.shape[2] % max(chunks))
    return prefix.split(sizes, dim=2)


@torch.no_grad()
def commit(generator: Callable, x0: Tensor, context: Tensor, cache: KVCache, sigma=0.0) -> None:
    """Take finished frames x0 [B, C, T, H, W] into the cache, under a text: the clean pass.

    sigma: where that is kept whose last pass was at another level, as x0 the input of that pass.
    """
    cache.use_text(context)
    generator(x0.detach(), sigma, context, cache=cache)
    cache.commit(x0.shape[2])


@torch.no_grad()
def keep_last(field: Callable, x0: Tensor, levels: list[float], fresh, cache: KVCache) -> None:
    """Make the keys of the last level's forward permanent, in place of those of a clean pass: a
    forward less for each chunk (Diagonal Distillation; its weights are trained with such contexts).

    levels: from the one that x0 is of to the last. If that is not the same, as where training left
    the chunk above it, x0 is noised straight to the last level, by `fresh(like)`, and run there:
    chunks always see contexts of that one level, as in sampling, and none takes more forwards than
    with a clean pass.
    """
    if len(levels) > 1:
        field(add_noise(x0, fresh(x0), levels[-1]), levels[-1])
    cache.commit(cache.written - cache.frames)


def behind(model: Callable, prefix: Tensor) -> Callable:
    """The velocity of frames behind a prefix [B, C, T', H, W], which the model is shown clean."""

    def field(x: Tensor, sigma: float, context: Tensor, **kwargs) -> Tensor:
        frames = prefix.shape[2]
        levels = torch.full((len(x), frames + x.shape[2]), sigma, dtype=torch.float64)
        levels[:, :frames] = 0
        return model(torch.cat([prefix, x], 2), levels, context, **kwargs)[:, :, frames:]

    return field


def guided(model: Callable, guidance: float) -> Callable:
    """Classifier-free guidance, sampling convention uncond + g (cond - uncond), over a batch of two
    halves.

    The returned model takes x [B, ...] and context [2B, L, D] (conditional rows, then
    unconditional) and, if any, a cache of batch 2B, which keeps the two branches apart.
    """

    def field(x: Tensor, sigma: float | Tensor, context: Tensor, **kwargs) -> Tensor:
        if isinstance(sigma, Tensor) and sigma.ndim:
            sigma = torch.cat([sigma, sigma])
        cond, uncond = model(torch.cat([x, x]), sigma, context, **kwargs).chunk(2)
        return uncond + guidance * (cond - uncond)

    return field


# ------------------------------------------------------------------------------------------- losses


@torch.no_grad()
def dmd_gradient(
    x0: Tensor, fake: Tensor, real_cond: Tensor, real_uncond: Tensor, guidance: float
) -> Tensor:
    """Distribution-matching gradient from clean estimates [B, C, T, H, W] (DMD, arXiv 2311.18828,
    eqs. 7, 8).

    guidance is in the DMD convention, real = cond + g (cond - uncond): g = 3 is scale 4 of the
    sampling convention.
    """
    real = real_cond + guidance * (real_cond - real_uncond)
    # Never 0, so where all agree the gradient is 0. What is not finite stays so, and ends the run.
    scale = (x0 - real).abs().mean((1, 2, 3, 4), keepdim=True).clamp(min=1e-30)
    return (fake - real) / scale


def dmd_loss(x0: Tensor, grad: Tensor) -> Tensor:
    """0.5 mean((x0 - stopgrad(x0 - grad))^2), in float64: its derivative in x0 is grad / numel."""
    x0 = x0.double()
    target = (x0 - grad.double()).detach()
    return 0.5 * (x0 - target).square().mean()


def sid_loss(
    x0: Tensor,
    fake: Tensor,
    real_cond: Tensor,
    real_uncond: Tensor,
    guidance: float,
    alpha: float = 1.0,
) -> Tensor:
    """Score identity distillation (SiD, arXiv 2404.04057, eq. 23), float64.

    Grad runs through both networks into x0. Arguments as dmd_gradient's; the normaliser carries no
    grad.
    """
    x0, fake, real_cond, real_uncond = (x.double() for x in (x0, fake, real_cond, real_uncond))
    real = real_cond + guidance * (real_cond - real_uncond)
    scale = (x0 - real).abs().mean((1, 2, 3, 4), keepdim=True).detach()
    product = (real - fake) * ((real - x0) - alpha * (real - fake))
    return (product / scale).mean()


def critic_loss(v_fake: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Flow-matching loss of the critic, mean((v_fake - (noise - x0))^2), float32 (DMD2, arXiv
    2405.14867).
    """
    return (v_fake.float() - (noise.float() - x0.float())).square().mean()

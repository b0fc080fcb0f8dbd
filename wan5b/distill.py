"""The rollout, used alike by training and sampling, and the distillation losses. Models come as arguments.

A generator is anything called as model(x, sigma, context, cache=...) -> v (`replay`: and chunks=...).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from wan5b.flow import add_noise, solve, x0_from_v
from wan5b.kvcache import KVCache, chunk_sizes


def rollout(
    generator,
    noise,
    context,
    sigmas,
    chunks,
    cache,
    *,
    exit_step=None,
    renoise=None,
    prefix=None,
    solver="",
    trace=None,
) -> Iterator[Tensor]:
    """Generate chunk by chunk over a KV cache (Self Forcing, arXiv 2506.08009, algorithms 1 and 2).

    noise (Tensor [B, C, T, H, W]) covers the generated frames, cut into chunks (list of int; it may lie on the CPU: a
    long video's is moved chunk by chunk); context: Tensor [B, L, D]; sigmas (list of float): the levels, falling, last
    0; cache: KVCache.
    Yields every finished chunk x0 [B, C, T_block, H, W]; the cache takes it in (one pass at sigma 0, without grad)
    when the next one is asked for, so it must not be changed in place.

    exit_step: index of the level whose x0 is the result (None: the last). Grad, where enabled, flows through that
    level's forward alone; none crosses chunks, since committed keys carry none.
    renoise(chunk index, step index, like) -> noise for the next level; default: fresh. prefix: clean frames
    [B, C, T', H, W] (an image, a video to continue) committed ahead of the first chunk.
    solver: "unipc" or "euler" integrates the flow through all levels instead of re-noising (many-step sampling).
    trace: a list that takes the input of every chunk's exit level, for `replay`.
    """
    if sum(chunks) != noise.shape[2]:
        raise ValueError(
            f"chunks {chunks} add up to {sum(chunks)} frames, the noise has {noise.shape[2]}"
        )
    exit_step = len(sigmas) - 2 if exit_step is None else exit_step
    if not 0 <= exit_step < len(sigmas) - 1:
        raise ValueError(
            f"exit_step must be in 0 .. {len(sigmas) - 2} for levels {sigmas}, got {exit_step}"
        )
    if prefix is not None and prefix.shape[2]:
        rest = prefix.shape[2] % max(chunks)  # goes in front: 7 frames in chunks of 3 are 1, 3, 3
        for chunk in prefix.split(chunk_sizes(prefix.shape[2], max(chunks), rest), dim=2):
            _commit(generator, chunk, context, cache)

    for index, x in enumerate(noise.split(chunks, dim=2)):
        x = x.to(context.device)
        if solver:
            x0 = solve(
                lambda x, sigma: generator(x, sigma, context, cache=cache), x, sigmas, solver
            )
        else:
            for step in range(exit_step):
                with torch.no_grad():
                    x0 = x0_from_v(
                        x, generator(x, sigmas[step], context, cache=cache), sigmas[step]
                    )
                    fresh = renoise(index, step, x0) if renoise else torch.randn_like(x0)
                    x = add_noise(x0, fresh, sigmas[step + 1])
            if trace is not None:
                trace.append(x)
            x0 = x0_from_v(
                x, generator(x, sigmas[exit_step], context, cache=cache), sigmas[exit_step]
            )
        yield x0
        _commit(generator, x0, context, cache)


def replay(
    generator: Callable, context: Tensor, sigma: float, trace: list[Tensor], cache: KVCache
) -> Tensor:
    """The exit levels of the rollout that filled the cache again, now with grad -> x0 [B, C, T, H, W] of its chunks.

    One forward for all: each chunk's keys are its own and the committed ones, which are there and carry no grad. So
    the rollout itself runs without grad, its loss, a function of x0 alone, is differentiated first, and sharded
    weights are gathered, and their gradients reduced, once. Needs a cache of the whole video.
    """
    x = torch.cat(trace, 2)
    return x0_from_v(
        x,
        generator(x, sigma, context, chunks=[part.shape[2] for part in trace], cache=cache),
        sigma,
    )


@torch.no_grad()
def _commit(generator: Callable, x0: Tensor, context: Tensor, cache: KVCache) -> None:
    generator(x0.detach(), 0.0, context, cache=cache)
    cache.commit(x0.shape[2])


def guided(model: Callable, guidance: float) -> Callable:
    """Classifier-free guidance, sampling convention uncond + g (cond - uncond), as a model over a batch of two halves.

    The returned model takes x [B, ...] and context [2B, L, D] (conditional rows, then unconditional) and, if any, a
    cache of batch 2B, which keeps the two branches apart.
    """

    def field(x: Tensor, sigma, context: Tensor, **kwargs) -> Tensor:
        sigma = torch.cat([sigma, sigma]) if isinstance(sigma, Tensor) and sigma.ndim else sigma
        cond, uncond = model(torch.cat([x, x]), sigma, context, **kwargs).chunk(2)
        return uncond + guidance * (cond - uncond)

    return field


@torch.no_grad()
def dmd_gradient(
    x0: Tensor, fake: Tensor, real_cond: Tensor, real_uncond: Tensor, guidance: float
) -> Tensor:
    """Distribution-matching gradient from three clean estimates [B, C, T, H, W] (DMD, arXiv 2311.18828, eqs. 7, 8).

    guidance is in the DMD convention, real = cond + g (cond - uncond): g = 3 is scale 4 of the sampling convention.
    """
    real = real_cond + guidance * (real_cond - real_uncond)
    return ((fake - real) / (x0 - real).abs().mean((1, 2, 3, 4), keepdim=True)).nan_to_num()


def dmd_loss(x0: Tensor, grad: Tensor) -> Tensor:
    """0.5 mean((x0 - stopgrad(x0 - grad))^2), in float64: its derivative in x0 is grad / numel."""
    x0 = x0.double()
    return 0.5 * (x0 - (x0 - grad.double()).detach()).square().mean()


def sid_loss(
    x0: Tensor,
    fake: Tensor,
    real_cond: Tensor,
    real_uncond: Tensor,
    guidance: float,
    alpha: float = 1.0,
):
    """Score identity distillation (SiD, arXiv 2404.04057, eq. 23), float64; grad runs through both networks into x0.

    Arguments as dmd_gradient's; the normaliser carries no grad.
    """
    x0, fake, real_cond, real_uncond = (x.double() for x in (x0, fake, real_cond, real_uncond))
    real = real_cond + guidance * (real_cond - real_uncond)
    scale = (x0 - real).abs().mean((1, 2, 3, 4), keepdim=True).detach()
    return ((real - fake) * ((real - x0) - alpha * (real - fake)) / scale).mean()


def critic_loss(v_fake: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Flow-matching loss of the critic, mean((v_fake - (noise - x0))^2) in float32 (DMD2, arXiv 2405.14867)."""
    return (v_fake.float() - (noise.float() - x0.float())).square().mean()

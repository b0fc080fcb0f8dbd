"""The training stages: what one global batch does to one network. Used by train.py, which owns the
loop.

Stages in the order that works for the 5B: teacher (fine-tuning, tiny models), ar, ode, then dmd or
sid. A step is a function of a run and one micro-batch: it computes a loss, runs its backward and
returns its metrics. `PHASES` names the steps of each stage, so a new loss is a new function and a
row there.

A metric is a detached scalar under a name that no other phase of the stage has. metrics.jsonl gets
its mean over micro-batches and processes, so a step always returns the same names in the same
order. A metric that is not finite ends the run: so a mean over some of the samples only, which a
micro-batch may lack, is returned as two means over all, to be divided (`critic_figures`).

What steps share, a run and its micro-batches, is in runs.py.
"""

import math
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from wan5b.distill import critic_loss, dmd_gradient, dmd_loss, replay, rollout, sid_loss
from wan5b.dit import WanDiT
from wan5b.flow import add_noise, ar_loss_weight, shift_sigma, x0_from_v
from wan5b.runs import Batch, Run, micro_batches

# ------------------------------------------------------------------------------- against real data


def teacher_step(run: Run, batch: Batch) -> dict[str, Tensor]:
    """Flow matching of the bidirectional network, at one level a clip."""
    x0, noise, sigma, context = flow_example(run, batch, levels=1)
    v = run.generator(add_noise(x0, noise, sigma), sigma, context)
    return backward(flow_loss(run, v, x0, noise, sigma))


def ar_step(run: Run, batch: Batch) -> dict[str, Tensor]:
    """Causal flow matching, at a level a chunk (CausVid, arXiv 2412.07772; Self Forcing's first
    stage).

    Behind clean chunks with teacher forcing, behind noisy ones with diffusion forcing.
    """
    x0, noise, sigma, context = flow_example(run, batch, levels=len(run.layout))
    clean = x0 if run.cfg.forcing == "teacher" else None
    noisy = add_noise(x0, noise, sigma)
    options = {"chunks": run.layout, "window": run.window, "clean": clean}
    v = run.generator(noisy, sigma, context, **options)
    return backward(flow_loss(run, v, x0, noise, sigma))


def flow_example(run: Run, batch: Batch, levels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x0 and noise [B, C, T, H, W]; sigma [B, T]; context [B, L, D], for a share `dropout` of the
    samples the negative prompt's.
    """
    cfg = run.cfg
    x0 = run.clips(batch.items)
    noise = batch.draws(torch.randn, *run.shape(cfg.frames))
    dropped = batch.draws(torch.rand) < cfg.dropout
    context = torch.where(dropped[:, None, None], run.context([cfg.negative]), batch.context)
    sigma = run.per_frame(shift_sigma(batch.draws(torch.rand, levels), cfg.shift))
    return x0, noise, sigma, context


def flow_loss(run: Run, v: Tensor, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """mean((v - (noise - x0))^2) behind the prefix, weighted over levels with `bell`."""
    cfg = run.cfg
    error = (v.float() - (noise - x0)).square().mean((1, 3, 4))  # [B, T]
    error = error[:, cfg.prefix :]
    if cfg.bell:
        error = error * ar_loss_weight(sigma[:, cfg.prefix :], cfg.shift)
    return error.mean()


def ode_step(run: Run, batch: Batch) -> dict[str, Tensor]:
    """Regression to ODE trajectories: x at a level -> its end (CausVid, arXiv 2412.07772, section
    4.3).
    """
    cfg = run.cfg
    levels = torch.tensor(run.data.store.facts["sigmas"], device=run.device)
    x = torch.stack([run.data.store[i]["x"] for i in batch.items])  # [B, levels, C, T, H, W]
    x = x.to(run.device, torch.float32)
    end = x[:, -1]

    # A level a chunk. With a clean half (teacher forcing) it is never 0, where there is nothing to
    # learn.
    teacher_forcing = cfg.forcing == "teacher"
    count = len(levels) - 1 if teacher_forcing else len(levels)
    if run.rollouts:
        chosen = run.rollouts.ode_levels(run, batch, levels)
    else:
        chosen = (batch.draws(torch.rand, len(run.layout)) * count).long()
    index = run.per_frame(chosen, clean=len(levels) - 1)  # [B, T]
    sigma = levels[index]
    noisy = x.gather(1, index[:, None, None, :, None, None].expand(-1, 1, *end.shape[1:]))[:, 0]

    clean = end if teacher_forcing else None
    options = {"chunks": run.layout, "window": run.window, "clean": clean}
    if run.rollouts and teacher_forcing:
        options |= run.rollouts.ode_context(run, batch, end)
    v = run.generator(noisy, sigma, batch.context, **options)

    # The mean over each sample's own frames at levels above 0: so it does not depend on
    # micro-batches.
    error = (x0_from_v(noisy, v, sigma) - end).square().mean((1, 3, 4))  # [B, T]
    counted = (sigma > 0).float()
    per_sample = (error * counted).sum(1) / counted.sum(1).clamp(min=1)
    return backward(per_sample.mean())


def backward(loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {"loss": loss.detach()}


# ---------------------------------------------------------------------------- on its own rollouts


class Rolled(NamedTuple):
    """What a rollout without grad leaves."""

    x0: Tensor  # [B, C, T, H, W], the generated chunks
    prefix: Tensor | None  # clean frames in front of them
    trace: list[Tensor]  # the input of each chunk's exit level
    exit_step: int  # of the last chunk
    sigma: float | Tensor  # the exit level, [1, T] where chunks differ
    shown: int = 0  # so many of its first frames are only shown to the networks, and get no grad


class Noised(NamedTuple):
    """Prefix and rollout at one random level a sample."""

    xs: Tensor
    sigma: Tensor  # [B, T], 0 at the prefix
    noise: Tensor


def dmd_step(
    run: Run, batch: Batch, show_teacher: Callable[[Noised], Noised] | None = None
) -> dict[str, Tensor]:
    """Distribution matching of the generator on its own rollouts (Self Forcing, algorithm 1).

    show_teacher: makes of the noised rollout what the teacher scores in its place, at the same
    levels: the gradient is the difference of the two scores.

    The GAN branch has a step of its own (extras/gan.py): what changes here changes there.
    """
    # 1. Roll out without grad, up to a random exit level.
    rolled = roll_out(run, batch)
    x0 = rolled.x0

    # 2. Noise it to one random level. 3. Score it with the critic and the teacher.
    with torch.no_grad():
        noised = noise_again(run, batch, rolled)
        fake = estimate(run.critic, noised, batch.context, x0.shape[2])
        scored = show_teacher(noised) if show_teacher else noised
        real, real_uncond = teach(run, batch, scored, x0.shape[2])

    # 4. The DMD gradient, as a loss in x0 alone.
    gradient = dmd_gradient(x0, fake, real, real_uncond, run.cfg.guidance)
    x0.requires_grad_()
    loss = dmd_loss(x0, gradient)

    # 5. The exit levels once more, with grad, carry it into the weights.
    into_weights(run, batch, rolled, loss)

    # 6. What is worth a look.
    return {"loss": loss.detach().float()} | health(rolled, gradient)


def sid_step(run: Run, batch: Batch) -> dict[str, Tensor]:
    """Score identity distillation on its own rollouts: as `dmd_step`, but the loss's gradient in x0
    runs through the critic and the teacher.
    """
    cfg = run.cfg
    rolled = roll_out(run, batch)
    x0 = rolled.x0.requires_grad_()
    noised = noise_again(run, batch, rolled)
    fake = estimate(run.critic, noised, batch.context, x0.shape[2])
    real, real_uncond = teach(run, batch, noised, x0.shape[2])
    loss = sid_loss(x0, fake, real, real_uncond, cfg.guidance, cfg.alpha)
    into_weights(run, batch, rolled, loss)
    gradient = dmd_gradient(x0, fake, real, real_uncond, cfg.guidance)
    return {"loss": loss.detach().float()} | health(rolled, gradient)


def critic_step(run: Run, batch: Batch) -> dict[str, Tensor]:
    """Flow matching of the critic on the generator's rollouts (DMD2, arXiv 2405.14867)."""
    rolled = roll_out(run, batch)
    noised = noise_again(run, batch, rolled)
    v = run.critic(noised.xs, noised.sigma, batch.context)
    loss, figures = critic_figures(rolled, noised, v)
    loss.backward()
    return figures


def critic_figures(rolled: Rolled, noised: Noised, v: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The critic's loss for its velocity v of the whole sequence, and what is worth a look."""
    x0 = rolled.x0
    frames = x0.shape[2]
    v = v[:, :, -frames:]
    noise = noised.noise[:, :, -frames:]
    loss = critic_loss(v, x0, noise)

    # The loss at high levels is critic_high / critic_share_high: a micro-batch may have none.
    error = (v.detach().float() - (noise - x0)).square().mean((1, 2, 3, 4))
    high = (noised.sigma[:, -1] > 0.8).float()
    figures = {
        "critic_loss": loss.detach(),
        "critic_high": (high * error).mean(),
        "critic_share_high": high.mean(),
    }
    return loss, figures


@torch.no_grad()
def roll_out(run: Run, batch: Batch) -> Rolled:
    """A rollout up to a random exit level, the same for all samples.

    With rollout = "data" each chunk stands behind real frames, those of a clip: teacher forcing
    with DMD, which the paper compares itself with. Scored and replayed it is as any other.
    """
    if run.rollouts:
        return run.rollouts.roll_out(run, batch)
    exit_step = int(torch.randint(len(run.sigmas) - 1, (), generator=batch.chance))
    made = roll(run, batch, run.chunks, run.sigmas, exit_step=exit_step)
    return Rolled(*made, exit_step, run.sigmas[exit_step])


def roll(run: Run, batch: Batch, chunks: list[int], sigmas, **options) -> tuple:
    """The rollout itself -> x0, prefix and trace, as `Rolled` has them.

    sigmas, options: of `rollout`.
    """
    cfg = run.cfg
    clips = run.clips(batch.items) if cfg.prefix or cfg.rollout == "data" else None
    prefix = clips[:, :, : cfg.prefix] if cfg.prefix else None
    committed = clips[:, :, cfg.prefix :] if cfg.rollout == "data" else None

    def renoise(chunk: int, step: int, like: Tensor) -> Tensor:
        return batch.draws(torch.randn, *like.shape[1:])

    run.cache.reset()
    noise = batch.draws(torch.randn, *run.shape(sum(chunks)))
    inputs = (run.generator, noise, batch.context, sigmas, chunks, run.cache)
    trace = []
    options |= {"renoise": renoise, "prefix": prefix, "committed": committed, "trace": trace}
    with run.world.gathered(run.generator):
        # Asking for no more than there is: nothing needs the last chunk in the cache.
        finished = islice(rollout(*inputs, **options), len(chunks))
        x0 = torch.cat(list(finished), 2)
    return x0, prefix, trace


def noise_again(run: Run, batch: Batch, rolled: Rolled) -> Noised:
    """The rollout behind its prefix, at one random level a sample (DMD2, arXiv 2405.14867):
    uniform, shifted, from .02 to .98. For generator and critic.
    """
    whole = rolled.x0
    if rolled.prefix is not None:
        whole = torch.cat([rolled.prefix, rolled.x0], 2)
    noise = batch.draws(torch.randn, *whole.shape[1:])
    level = shift_sigma(batch.draws(torch.rand, 1), run.cfg.shift).clamp(0.02, 0.98)
    sigma = run.per_frame(level)
    return Noised(add_noise(whole, noise, sigma), sigma, noise)


def estimate(network: WanDiT, noised: Noised, context: Tensor, frames: int) -> Tensor:
    """x0 of the last frames as a network sees it."""
    v = network(noised.xs, noised.sigma, context)
    return x0_from_v(noised.xs, v, noised.sigma)[:, :, -frames:]


def teach(run: Run, batch: Batch, noised: Noised, frames: int) -> tuple[Tensor, Tensor]:
    """x0 of the last frames as the teacher sees it, with text and without."""
    real = estimate(run.teacher, noised, batch.context, frames)
    if not run.cfg.guidance:
        return real, real
    negative = run.context([run.cfg.negative] * len(batch.items))
    return real, estimate(run.teacher, noised, negative, frames)


def into_weights(run: Run, batch: Batch, rolled: Rolled, loss: Tensor) -> None:
    """Backward of a loss in the rollout's x0: into x0, then through a replay of the exit levels.

    The first of these is asked for x0's gradient alone: a loss that runs through the critic leaves
    none in the critic's weights.
    """
    (grad,) = torch.autograd.grad(loss, rolled.x0)
    grad[:, :, : rolled.shown] = 0
    replay(run.generator, batch.context, rolled.sigma, rolled.trace, run.cache).backward(grad)


def health(rolled: Rolled, gradient: Tensor) -> dict[str, Tensor]:
    """Figures of a distillation that say more than its loss: size of the gradient, spread of x0."""
    x0 = rolled.x0.detach()
    figures = {
        "gradient": gradient.abs().mean(),
        "x0_motion": x0.var(2, correction=0).mean(),  # over time: a static video shows here
    }
    sizes = [x.shape[2] for x in rolled.trace]
    for i, chunk in enumerate(x0.split(sizes, 2)):
        figures[f"x0_mean_{i}"] = chunk.mean()
        figures[f"x0_std_{i}"] = chunk.std()
    return figures


# --------------------------------------------------------------------------------------- iterations


class Phase(NamedTuple):
    """One update of one network in an iteration."""

    name: str  # of its random numbers
    moves: str  # "generator" or "critic"
    step: Callable[[Run, Batch], dict[str, Tensor]]


CRITIC = Phase("critic", "critic", critic_step)
PHASES = {
    "teacher": [Phase("flow", "generator", teacher_step)],
    "ar": [Phase("flow", "generator", ar_step)],
    "ode": [Phase("ode", "generator", ode_step)],
    "dmd": [Phase("generator", "generator", dmd_step), CRITIC],
    "sid": [Phase("generator", "generator", sid_step), CRITIC],
}
STAGES = tuple(PHASES)
DISTILLATIONS = ("dmd", "sid")


def iteration(run: Run, step: int) -> dict[str, Tensor]:
    """Every phase that is due, each with a global batch of its own; the metrics of all.

    The generator of a distillation moves once in `ratio` iterations. InterruptedError: see
    `micro_batches`.
    """
    metrics = {}
    moved = False
    for phase in run.phases:
        rests = run.critic is not None and step % run.cfg.ratio != 0
        if phase.moves == "generator" and rests:
            continue
        rows = [phase.step(run, batch) for batch in micro_batches(run, phase.name, step, moved)]
        metrics |= {key: torch.stack([row[key] for row in rows]).mean() for key in rows[0]}
        norm = "critic_norm" if phase.moves == "critic" else "norm"
        metrics[norm] = update(run, phase.moves, step)
        moved = True
    return metrics


def update(run: Run, network: str, step: int) -> Tensor:
    """The optimizer's step, behind all micro-batches; returns the gradient's norm."""
    cfg = run.cfg
    optimizer = run.optimizers[network]
    rate = cfg.lr if network == "generator" else cfg.critic_lr
    if cfg.decay:
        rate *= 0.5 * (1 + math.cos(math.pi * step / cfg.steps))
    optimizer.lr = rate * min(1.0, (step + 1) / (cfg.warmup + 1))
    count = len(run.world.share(cfg.batch)) // cfg.micro_batch  # of micro-batches
    ema = cfg.ema if step >= cfg.ema_start else 0.0
    return optimizer.step(1 / count, cfg.clip, ema)

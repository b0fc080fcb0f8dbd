"""Sample videos of a run of train.py: clips of fixed prompts, always from the same noise."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from wan5b.extras.clips import write
from wan5b.extras.codec import LinearCodec
from wan5b.extras.formats import load_vae
from wan5b.extras.recipes import MADE_FOR
from wan5b.extras.sampling import MODES, generate
from wan5b.flow import sampling_sigmas
from wan5b.fsdp import World, local
from wan5b.optim import AdamW
from wan5b.runs import Run
from wan5b.stages import DISTILLATIONS
from wan5b.util import rng
from wan5b.vae22 import VAE22

STEPS = 24  # of the modes with guidance


@contextmanager
@torch.no_grad()
def averaged(optimizer: AdamW) -> Iterator[None]:
    """Its model with the moving average in place of its weights, if one is kept."""
    weights = {}
    for name, state in optimizer.state_of.items():
        if "ema" in state:
            weight = local(optimizer.parameters[name])
            weights[name] = weight.clone()
            weight.copy_(state["ema"])
    yield
    for name, weight in weights.items():
        local(optimizer.parameters[name]).copy_(weight)


def open_vae(cfg, world: World) -> VAE22 | LinearCodec | None:
    """The VAE that the config names, if it does, on the first process. cfg: train.py's Config.

    Every process opens it, needed or not: what is wrong with it ends all of them.
    """
    if not cfg.vae:
        return None
    device = world.device if world.rank == 0 else "meta"
    return load_vae(cfg.vae, device, getattr(torch, cfg.dtype))


@torch.no_grad()
def sample_videos(run: Run, vae, folder: Path, step: int) -> None:
    """A clip of each sample prompt, from the same noise each time, as this stage's model generates.

    Image to video starts from the first frames of the data's first clips, whatever the prompts.
    """
    cfg = run.cfg
    mode = MODES[MADE_FOR.get(cfg.stage, "few")]
    how = {"causal": mode.causal, "solver": "renoise", "window": run.window, "seed": cfg.seed}
    if cfg.stage in DISTILLATIONS:  # others have no sink, and their exports say nothing of one
        how |= {"sink": cfg.sink, "sink_rope": cfg.sink_rope}
    if run.rollouts:
        how |= {"sigmas_after": run.rollouts.after, "clean_pass": cfg.clean_pass}
    sigmas = run.sigmas
    if mode.guided:
        how |= {"solver": "euler", "guidance": cfg.sample_guidance}
        sigmas = sampling_sigmas(STEPS, cfg.shift)

    with averaged(run.optimizers["generator"]):
        for i, prompt in enumerate(cfg.sample_prompts):
            shape = run.shape(sum(run.chunks))
            noise = torch.randn((1, *shape), generator=rng("cpu", cfg.seed, "sample", i))
            context = run.context([prompt, cfg.negative] if mode.guided else [prompt])
            prefix = None
            if cfg.prefix:
                prefix = run.clips([i % len(run.data.store)])[:, :, : cfg.prefix]
            # By all processes, which share the weights. What is gathered goes before the decoding.
            with run.world.gathered(run.generator):
                inputs = (run.generator, noise, context, sigmas, run.chunks)
                latents = list(generate(*inputs, prefix=prefix, **how))
            if run.world.rank == 0:
                path = folder / f"step-{step:07d}-{i}.mp4"
                write(vae, latents, path, fps=run.fps)

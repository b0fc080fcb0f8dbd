"""A run of training and its micro-batches: what the steps of all stages share.

Every random number comes from (seed, phase, step, sample), so a run is the same on any number of
processes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wan5b.data import Data, order
from wan5b.dit import WanDiT
from wan5b.flow import few_step_sigmas
from wan5b.kvcache import KVCache, chunk_sizes
from wan5b.util import rng


@dataclass
class Run:
    """Config, data and networks of a run; train.py makes it.

    cfg: train.py's Config. world: fsdp.World. budget: the memory that it is expected to need
    (extras/budget.py). optimizers: optim.AdamW by the name of what they move. phases: of an
    iteration, as stages.PHASES has them. critic, teacher and cache: of distillations, else None.
    rollouts: how they are made, if not all as in the plain method (extras/rollouts.py). fps: of the
    clips that it learns from, frames a second.
    """

    cfg: Any
    world: Any
    data: Data
    budget: dict[str, dict[str, float]]
    generator: WanDiT
    optimizers: dict[str, Any]
    phases: list[Any]
    critic: WanDiT | None = None
    teacher: WanDiT | None = None
    cache: KVCache | None = None
    rollouts: Any = None
    fps: int = 24

    def __post_init__(self):
        cfg = self.cfg
        self.device = self.world.device
        self.dtype = getattr(torch, cfg.dtype)
        self.window = cfg.window or None
        self.sigmas = few_step_sigmas(cfg.levels, cfg.shift)
        self.layout = chunk_sizes(cfg.frames, cfg.chunk, cfg.prefix)  # of whole sequences
        self.chunks = self.layout[cfg.prefix :]  # the generated ones

    def context(self, prompts: list[str]) -> Tensor:
        """Their embeddings, [B, L, D], in the compute dtype. ValueError if one is missing."""
        length = self.generator.cfg.text_len
        return self.data.text.batch(prompts, length).to(self.device, self.dtype)

    def clips(self, items: list[int]) -> Tensor:
        """Clean latents of these items, float32: the data's, or the ends of trajectories."""
        return torch.stack([self.data.clip(i) for i in items]).to(self.device, torch.float32)

    def shape(self, frames: int) -> tuple[int, ...]:
        """Of so many frames of one sample: [C, T, H, W]."""
        return (self.generator.cfg.in_dim, frames, self.cfg.height, self.cfg.width)

    def per_frame(self, per_chunk: Tensor, clean: float = 0) -> Tensor:
        """Levels (or their indices) [B, chunks] or [B, 1] -> [B, T]; `clean` at a prefix."""
        sizes = torch.tensor(self.layout, device=self.device)
        level = per_chunk.expand(-1, len(sizes)).repeat_interleave(sizes, 1)
        level[:, : self.cfg.prefix] = clean
        return level


class Draws:
    """The random numbers of a micro-batch, each sample's from a generator of its own."""

    def __init__(self, device: torch.device, samples: range, *keys):
        self.generators = [rng(device, *keys, sample) for sample in samples]

    def __call__(self, draw: Callable, *shape: int) -> Tensor:
        """[samples, *shape] by torch.randn or torch.rand."""
        return torch.stack([draw(shape, generator=g, device=g.device) for g in self.generators])


class Batch(NamedTuple):
    """One micro-batch."""

    draws: Draws
    items: list[int]  # of the data
    context: Tensor  # [B, L, D]
    chance: torch.Generator  # for what all samples of a global batch share, alike on all processes


def micro_batches(run: Run, phase: str, step: int, moved: bool) -> Iterator[Batch]:
    """This process's micro-batches of a global batch.

    InterruptedError, on all processes at once, if one has got SIGTERM. moved: whether a network has
    moved in this step already; then it is finished first.
    """
    cfg = run.cfg
    share = run.world.share(cfg.batch)
    for start in range(share.start, share.stop, cfg.micro_batch):
        if not moved and run.world.stops():
            raise InterruptedError
        samples = range(start, start + cfg.micro_batch)
        prompts = run.data.prompts
        shuffle = str((cfg.seed, phase))
        items = [order(len(prompts), step * cfg.batch + sample, shuffle) for sample in samples]
        yield Batch(
            Draws(run.device, samples, cfg.seed, phase, step),
            items,
            run.context([prompts[i] for i in items]),
            rng("cpu", cfg.seed, phase, step, "exit"),
        )

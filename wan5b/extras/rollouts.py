"""Rollouts of training that are not all like the plain method's: levels that differ between chunks,
no clean pass, videos that are longer than what is scored. `Run.rollouts` of a run that has any.

**Levels.** The first chunk goes down `levels`, all others `levels_after` (4 and 2 in
Causal-Forcing++; behind an image or a video the first generated chunk is the first). One exit is
drawn for all chunks and processes, as a share of the way: each chunk leaves at any of its own
levels alike, and all of them early or all late, so that what is scored is of one quality. The
public code draws one for the first and one for the others (Causal-Forcing++), or cuts one index to
the shorter list (Diagonal Distillation), where short lists leave at their last level mostly.

**No clean pass** (Diagonal Distillation). `distill.keep_last` has what is committed. Its public
code trains with one more forward at the last level for every chunk, over x0 noised anew; ours only
where the exit is above the last level, and at the last one keeps the forward's own keys, as
sampling does. Stage ode regresses behind contexts noised to the last level likewise.

**Long rollouts** (Self Forcing++, arXiv 2510.02283). What is scored are the last `frames` of a
rollout whose length is drawn, `frames` to `rollout_frames`: a window at a random place of a long
video, which need not be made behind it. Only these chunks get grad. Teacher and critic know videos
whose first latent frame is one picture, where others are four. So in a window inside of a video
that frame is replaced by a picture, as in Self Forcing's public code: the last pixel frame that it
decodes to, encoded by itself. Its chunk is shown and gets no grad. With prefix = 1 the picture
stands in front of the window, clean, in the prefix's place, and all chunks get grad: that is ours.
In the tiny world, whose codec repeats the picture over the patch, that changes little.
"""

import math

import torch
from torch import Tensor

from wan5b.attention import rope_table, rotate
from wan5b.dit import DiTConfig
from wan5b.extras.budget import cache_frames
from wan5b.extras.codec import split_vae
from wan5b.extras.formats import load_vae
from wan5b.flow import add_noise, few_step_sigmas
from wan5b.fsdp import World
from wan5b.kvcache import KVCache, Span
from wan5b.runs import Batch, Run
from wan5b.stages import DISTILLATIONS, Rolled, roll


class Rollouts:
    """What `Run.rollouts` is asked for.

    cfg: train.py's Config. vae: encoder and decoder, where rollouts are longer than what is scored.
    """

    def __init__(self, cfg, vae: tuple | None = None):
        self.cfg = cfg
        self.vae = vae
        self.first = few_step_sigmas(cfg.levels, cfg.shift)
        self.after = few_step_sigmas(cfg.levels_after or cfg.levels, cfg.shift)

    # ------------------------------------------------------------------------------- distillations

    def roll_out(self, run: Run, batch: Batch) -> Rolled:
        """As `stages.roll_out`, without grad. What is drawn is alike on all processes."""
        cfg = self.cfg
        share = int(torch.randint(self.exits, (), generator=batch.chance))
        more = int(torch.randint(self.windows, (), generator=batch.chance))
        chunks = run.chunks + [cfg.chunk] * more
        ways = [self.first, *[self.after] * (len(chunks) - 1)]
        steps = [share * (len(way) - 1) // self.exits for way in ways]

        how = {"exit_step": iter(steps), "clean_pass": cfg.clean_pass}
        x0, prefix, trace = roll(run, batch, chunks, iter(ways), **how)

        # The window, and at which level each of its frames was left.
        frames = sum(run.chunks)
        scored = slice(more, None)
        levels = [way[step] for way, step in zip(ways, steps, strict=True)]
        sigma = per_frame(levels[scored], chunks[scored]).to(run.device)
        rolled = Rolled(x0[:, :, -frames:], prefix, trace[scored], steps[-1], sigma)
        if not more:
            return rolled

        # Its first frame becomes a picture, or has one in front.
        before = x0[:, :, : x0.shape[2] - frames]
        if cfg.prefix:
            return rolled._replace(prefix=picture(self.vae, torch.cat([prefix, before], 2)))
        shown = picture(self.vae, torch.cat([before, rolled.x0[:, :, :1]], 2))
        whole = torch.cat([shown, rolled.x0[:, :, 1:]], 2)
        return rolled._replace(x0=whole, shown=chunks[0])

    @property
    def exits(self) -> int:
        """Shares of the way at which chunks can be left: as many as fit all lists of levels."""
        return math.lcm(len(self.first) - 1, len(self.after) - 1)

    @property
    def windows(self) -> int:
        """How many places the window may have."""
        return 1 + max(self.cfg.rollout_frames - self.cfg.frames, 0) // self.cfg.chunk

    # ----------------------------------------------------------------------------------------- ode

    def ode_levels(self, run: Run, batch: Batch, stored: Tensor) -> Tensor:
        """Indices [B, chunks] among the stored levels: any of its own ones for each chunk.

        With a clean half it is never the last, 0, as in `stages.ode_step`.
        """
        drawn = batch.draws(torch.rand, len(run.layout))  # [B, chunks]
        end = -1 if run.cfg.forcing == "teacher" else None
        chosen = []
        for way, share in zip(self.ways(run), drawn.unbind(1), strict=True):
            levels = torch.tensor(way[:end], dtype=stored.dtype, device=stored.device)
            known = (stored - levels[:, None]).abs().argmin(1)  # where they are stored
            chosen.append(known[(share * len(levels)).long()])
        return torch.stack(chosen, 1)

    def ode_context(self, run: Run, batch: Batch, end: Tensor) -> dict[str, Tensor]:
        """Arguments of WanDiT: the context half, if there is no clean pass: each chunk at its last
        level. end: clean clips [B, C, T, H, W].
        """
        if run.cfg.clean_pass:
            return {}
        last = torch.tensor([[way[-2] for way in self.ways(run)]], device=run.device)
        sigma = run.per_frame(last)  # [1, T]
        noise = batch.draws(torch.randn, *end.shape[1:])
        return {"clean": add_noise(end, noise, sigma), "clean_sigma": sigma}

    def ways(self, run: Run) -> list[list[float]]:
        """The levels of all chunks of a sequence; a prefix has none, and counts as the first."""
        others = len(run.chunks) - 1
        return [self.first] * (run.cfg.prefix + 1) + [self.after] * others


def per_frame(levels: list[float], chunks: list[int]) -> Tensor:
    """A level for each chunk -> [1, T], float64."""
    return torch.tensor([levels], dtype=torch.float64).repeat_interleave(torch.tensor(chunks), 1)


@torch.no_grad()
def picture(vae: tuple, latents: Tensor) -> Tensor:
    """The last pixel frame that latents [B, C, T, H, W] decode to, encoded by itself: [B, C, 1, H,
    W]. vae: encoder and decoder.
    """
    encoder, decoder = vae
    state = decoder.stream()
    for frame in latents.split(1, 2):  # no more than the decoder's history is held
        pixels = decoder.decode_chunk(frame, state)
    return encoder.encode(pixels[:, :, -1:].float().clamp(-1, 1)).to(latents)


# ------------------------------------------------------------------------------------------- set-up


def are_longer(cfg) -> bool:
    """Whether rollouts of a run are longer than what is scored. cfg: train.py's Config."""
    return cfg.stage in DISTILLATIONS and cfg.rollout_frames > cfg.frames


def rollouts(cfg, world: World) -> Rollouts | None:
    """Of a run whose rollouts are not all like the plain method's. cfg: train.py's Config."""
    longer = are_longer(cfg)
    own = cfg.stage == "ode" or cfg.stage in DISTILLATIONS
    if not own or not (cfg.levels_after or longer or not cfg.clean_pass):
        return None
    vae = None
    if longer:
        whole = load_vae(cfg.vae, world.device, torch.float32)
        vae = split_vae(whole, getattr(torch, cfg.dtype))
    return Rollouts(cfg, vae)


def new_cache(cfg, sizes: DiTConfig, world: World) -> KVCache:
    """The cache of a distillation. cfg: train.py's Config. sizes: of the generator."""
    kind = TurningCache if cfg.sink_rope == "relative" else KVCache
    tokens = sizes.tokens_per_frame(cfg.height, cfg.width)
    held = (cfg.micro_batch, cache_frames(cfg), tokens)
    place = (world.device, getattr(torch, cfg.dtype))
    return kind(sizes, *held, cfg.window or None, cfg.sink, *place, cfg.sink_rope)


class TurningCache(KVCache):
    """A KVCache whose sink follows the window and that can be replayed: each chunk, whenever it
    runs, sees the sink where it was for that chunk.

    Nothing in memory is moved: the sink's keys are turned as they are read, which takes a copy.
    """

    def _turn_sink(self, turn: int) -> None:
        """Not here, where it would be for all chunks."""

    def extend(self, layer: int, k: Tensor, v: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        keys, values = super().extend(layer, k, v, span)
        turn = span.start + span.frames - self.window
        if turn <= 0:
            return keys, values
        # The sink's slots are the first ones.
        rows = self.sink * self.tokens_per_frame
        rope = rope_table(keys.shape[-1], turn, 1, 1, 1, keys.device)
        made = self.memory[layer, 0][:, :rows]
        return torch.cat([rotate(made, rope), keys[:, rows:]], 1), values

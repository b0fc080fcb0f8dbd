"""The training stages: each phase takes one global batch through one network. Used by train.py, which owns the loop.

Stages in the order that works for the 5B: teacher (fine-tuning, tiny models), ar, ode, then dmd or sid. Every random
number comes from (seed, phase, step, sample), so a run is the same on any number of processes.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from wan5b import fsdp
from wan5b.data import Store, TextStore, order
from wan5b.distill import critic_loss, dmd_gradient, dmd_loss, replay, rollout, sid_loss
from wan5b.dit import PRESETS, DiTConfig, WanDiT
from wan5b.extras.formats import open_dit, read_metadata
from wan5b.flow import add_noise, ar_loss_weight, few_step_sigmas, shift_sigma, x0_from_v
from wan5b.kvcache import KVCache, block_sizes
from wan5b.util import rng
from wan5b.weights import fill

GIB = 2**30
STAGES = (
    "teacher",
    "ar",
    "ode",
    "dmd",
    "sid",
)  # in their order; the last two distil causal networks


def activations(
    cfg, tokens: int, itemsize: int, checkpointing: bool, graphs=1, late: float = 0, keys=0
) -> float:
    """Bytes held at the peak of a backward through `graphs` forwards of so many tokens.

    What a block keeps of a token for its backward, in values: 12 D in the compute dtype (inputs of the projections, of
    the query and key norms, of both attentions, and their outputs), 7 D in float32 (three normed inputs, two outputs
    of norms, two gated branches) and twice the hidden layer. With checkpointing only the inputs of all blocks and one
    block's values are there at once. On top come gradients, at most of the hidden layer and of D twice in float32, and
    what the heads of further graphs keep, 3 D in float32. late: bytes of weight gradients, counted elsewhere, that come
    only as what the blocks keep goes, so that the larger of the two makes the peak. keys: how many keys self-attention
    reads besides the tokens' own (copies of a cache's); its outputs, made in parts, are there twice then.
    """
    width, wide, hidden = cfg.dim * itemsize, cfg.dim * 4, cfg.ffn_dim * itemsize
    block = tokens * (12 * width + 7 * wide + 2 * hidden) + (2 * keys + tokens * (keys > 0)) * width
    kept = (
        cfg.num_layers * graphs * tokens * width
        if checkpointing
        else (cfg.num_layers * graphs - 1) * block
    )
    return block + tokens * (hidden + 2 * wide + (graphs - 1) * 3 * wide) + max(kept - late, 0)


def forward_flop(
    cfg: DiTConfig, x: Tensor, *, cache=None, blocks=None, window=None, clean=None
) -> tuple[float, float]:
    """FLOP of the blocks' linear layers and of their attention in a forward, whose arguments are WanDiT's.

    Left out: what is done once a text, a frame or a forward.
    """
    window = cache.window if cache else window
    ends = (
        cache.ends(x.shape[2], blocks)
        if cache
        else [0, *itertools.accumulate(blocks or [x.shape[2]])]
    )
    pairs = sum(
        (end - start) * min(end, window or end) for start, end in itertools.pairwise(ends)
    )  # of frames
    sequences, per_frame = len(x) * (1 if clean is None else 2), cfg.tokens_per_frame(*x.shape[3:])
    tokens = sequences * x.shape[2] * per_frame
    linear = 2 * tokens * (6 * cfg.dim**2 + 2 * cfg.dim * cfg.ffn_dim)
    attention = 4 * cfg.dim * (sequences * pairs * per_frame**2 + tokens * cfg.text_len)
    return cfg.num_layers * linear, cfg.num_layers * attention


class Draws:
    """The random numbers of a micro-batch, each sample's from a generator of its own."""

    def __init__(self, device: torch.device, samples: range, *keys):
        self.generators = [rng(device, *keys, sample) for sample in samples]

    def __call__(self, draw: Callable, *shape: int) -> Tensor:
        """[samples, *shape] by torch.randn or torch.rand."""
        return torch.stack([draw(shape, generator=g, device=g.device) for g in self.generators])


class Run:
    """The networks, optimizers and data of a run, and its phases: each one global batch through one network."""

    def __init__(self, cfg, world: fsdp.World):
        self.cfg, self.world, self.device, self.dtype = (
            cfg,
            world,
            world.device,
            getattr(torch, cfg.dtype),
        )
        self.layout = block_sizes(cfg.frames, cfg.block, cfg.first)  # of whole sequences
        self.blocks = self.layout[cfg.first :]  # generated ones
        self.sigmas = few_step_sigmas(cfg.levels, cfg.shift)
        self.distilling = cfg.stage in ("dmd", "sid")
        self.text = TextStore(cfg.text)
        folder = cfg.trajectories if cfg.stage == "ode" else cfg.latents
        self.store = Store(folder) if folder else None
        negative = cfg.negative, self.text.facts.get("negative"), ""
        self.prompts = (
            self.store.prompts if folder else [p for p in self.text.prompts if p not in negative]
        )
        self.offload = cfg.offload and self.device.type == "cuda"  # a CPU's memory is the host's
        self.flop = 0.0  # done so far
        source = open_dit(cfg.weights) if cfg.weights else (PRESETS[cfg.preset], {})
        scores = (
            open_dit(cfg.teacher, channels=source[0].in_dim)
            if self.distilling and cfg.teacher
            else source
        )
        self.check(source[0], scores[0])  # before anything is loaded
        self.budget = self.expected(source[0], scores[0])
        self.afford(world.free())

        self.generator, tensors = self.network(*source)
        options = (
            cfg.lr,
            (cfg.beta1, cfg.beta2),
            cfg.weight_decay,
            self.offload,
        )  # `update` sets the rate
        self.optimizers = {
            "generator": fsdp.AdamW(self.generator, world, tensors, *options, ema=cfg.ema > 0)
        }
        if self.distilling:
            self.teacher, _ = self.network(*scores)
            self.teacher.requires_grad_(False)
            self.critic, tensors = self.network(*scores)
            self.optimizers["critic"] = fsdp.AdamW(self.critic, world, tensors, *options)
            tokens = self.generator.cfg.tokens_per_frame(cfg.height, cfg.width)
            sizes = (cfg.micro_batch, cfg.frames, tokens, cfg.window or None)
            self.cache = KVCache(self.generator.cfg, *sizes, device=self.device, dtype=self.dtype)

    def check(self, model: DiTConfig, scores: DiTConfig) -> None:
        """ValueError unless data, config and networks fit each other."""
        cfg, shape = self.cfg, (model.in_dim, self.cfg.frames, self.cfg.height, self.cfg.width)
        model.tokens_per_frame(cfg.height, cfg.width)
        takes, other = (model.text_dim, model.text_len), (scores.text_dim, scores.text_len)
        earlier = STAGES[self.distilling : STAGES.index(cfg.stage) + 1]
        for path, stages in ((cfg.weights, earlier), (self.distilling and cfg.teacher, STAGES[:1])):
            made = read_metadata(path).get("stage") if path else None
            if made and made not in stages:
                raise ValueError(
                    f"{path} is of stage {made}; {cfg.stage} takes a release there, or one of {stages}"
                )
        if takes != other:
            raise ValueError(
                f"weights and teacher take different texts (width, length): {takes} and {other}"
            )
        if not self.prompts:
            raise ValueError(
                f"{self.store.folder if self.store else cfg.text} holds nothing to train on"
            )
        self.text.check(
            [*self.prompts, *cfg.sample_prompts] + [cfg.negative] * (cfg.stage != "ode"), *takes
        )
        name, shape = ("x", (len(self.sigmas), *shape)) if cfg.stage == "ode" else ("latent", shape)
        if self.store and self.store.shapes.get(name) != shape:
            given = f"{self.store.folder} holds {self.store.shapes}, this run needs {name} {shape}"
            raise ValueError(
                f"{given}, (levels,) channels, frames, height, width: change these, or make it again"
            )
        levels = self.store.facts["sigmas"] if cfg.stage == "ode" else self.sigmas
        if any(abs(a - b) > 1e-3 for a, b in zip(levels, self.sigmas, strict=True)):
            raise ValueError(
                f"{self.store.folder} has levels {levels}, not {self.sigmas}: change levels and shift"
            )

    def expected(self, model: DiTConfig, scores: DiTConfig) -> dict[str, dict[str, float]]:
        """Bytes that this process comes to hold, part by part, on the "device" (of a CPU: all) and on the "host".

        Gradients are float32 and of one network at a time. Activations are those of the longest forward with grad, over
        a whole sequence: twice the tokens with a clean half, all keys that blocks see in a replay, for SiD the critic
        and both teacher forwards in one graph. With one micro-batch a phase, gradients come as activations go. FSDP
        gathers two blocks then, with the gradients of one, and all blocks in a rollout, which keeps no activations;
        what it adds up over replicas (HSDP) it holds until the end of a backward, beside the gradients.
        """
        cfg, size, shards = self.cfg, self.dtype.itemsize, self.world.shards
        with torch.device("meta"):
            n, m = (
                sum(p.numel() for p in WanDiT(c).parameters()) / shards for c in (model, scores)
            )
        m *= self.distilling  # critic, teacher
        device = {
            "weights": size * (n + 2 * m),
            "gradients": 4 * max(n, m) * (1 + (self.world.size > shards)),
        }
        host = {"masters while saving": 4 * (n + m) * (self.dtype != torch.float32)}
        places = fsdp.placed(self.dtype, cfg.beta1, cfg.ema > 0, self.offload, self.device)
        for place, groups in zip((device, host), places, strict=True):
            place |= {
                f"optimizer: {g}": fsdp.GROUPS[g].itemsize * (n + m * (g != "ema")) for g in groups
            }
        tokens = cfg.micro_batch * cfg.frames * model.tokens_per_frame(cfg.height, cfg.width)
        doubled, texts = (
            cfg.stage in ("ar", "ode") and cfg.forcing == "teacher",
            cfg.micro_batch * model.text_len,
        )
        graphs = 2 + (cfg.guidance != 0) if cfg.stage == "sid" else 1
        late = device["gradients"] * (len(self.world.share(cfg.batch)) == cfg.micro_batch)
        seen = sum(min(end, cfg.window or end) for end in itertools.accumulate(self.layout))
        keys = self.distilling * (seen - cfg.frames) * tokens // cfg.frames
        whole = activations(scores, tokens * (1 + doubled), size, cfg.checkpointing, graphs, late)
        device["activations"] = max(
            whole, activations(model, tokens, size, cfg.checkpointing, 1, late, keys)
        )
        device["KV cache"] = (
            2 * model.num_layers * (tokens + texts) * model.dim * size * self.distilling
        )
        if self.world.size > 1:
            block, rollout = (
                (3 * size + 4) * max(n, m) * shards / model.num_layers,
                n * shards * size * self.distilling,
            )
            device["activations"] = max(device["activations"] + block, rollout)
        return (
            {"device": device, "host": host}
            if self.device.type == "cuda"
            else {"device": device | host}
        )

    def afford(self, free: dict[str, float]) -> None:
        """Print the budget. ValueError, with what would help, if more is needed than is free."""
        ways = ["offload = true"] * (self.device.type == "cuda" and not self.offload)
        ways += ["checkpointing = true"] * (not self.cfg.checkpointing)
        ways += ["a smaller micro_batch"] * (self.cfg.micro_batch > 1) + ["more processes"]
        for place, parts in self.budget.items():
            needed = sum(parts.values())
            rows = parts | {"in all": needed, "free": free[place]}
            if self.world.rank == 0:
                print(
                    *(
                        f"{place:8}{part:24}{size / GIB:8.2f} GiB"
                        for part, size in rows.items()
                        if size
                    ),
                    sep="\n",
                )
            if needed > free[place]:
                given = f"{needed / GIB:.2f} GiB are needed on the {place}, {free[place] / GIB:.2f} are free"
                helps = (
                    ", ".join(ways)
                    if place == "device"
                    else "processes on more machines, or offload = false"
                )
                raise ValueError(f"{given}; what helps: {helps}")

    def network(
        self, model_cfg: DiTConfig, tensors: dict[str, Tensor]
    ) -> tuple[WanDiT, dict[str, Tensor]]:
        """A sharded network in the compute dtype, and the tensors it was filled from (if none, random ones)."""
        tensors = (
            tensors
            or WanDiT(model_cfg).init_weights(rng("cpu", self.cfg.seed, "init")).state_dict()
        )
        with torch.device("meta"):
            model = WanDiT(model_cfg).to(self.dtype)
        model = self.world.shard(model)
        fill(model, tensors, fsdp.copy_part)
        model.checkpointing = self.cfg.checkpointing
        model.register_forward_pre_hook(self._count, with_kwargs=True)
        return model, tensors

    def _count(self, model: WanDiT, args: tuple, options: dict) -> None:
        """Before a forward: add its FLOP to `flop`, and with grad the recomputation's and the backward's to come.

        The network's blocks count; attention's backward recomputes the scores (2.5 forwards); where the input needs
        grad, the weights don't (SiD).
        """
        linear, attention = forward_flop(model.cfg, args[0], **options)
        self.flop += linear + attention
        if torch.is_grad_enabled():
            self.flop += model.checkpointing * (linear + attention)
            self.flop += linear * (1 if args[0].requires_grad else 2) + 2.5 * attention

    def micro_batches(self, step: int, phase: str) -> Iterator[tuple[Draws, list[int], Tensor]]:
        """(draws, item indices, context) of each micro-batch of this process.

        InterruptedError, on all processes at once, if one has got SIGTERM and no network is ahead of the others.
        """
        share = self.world.share(self.cfg.batch)
        for start in range(share.start, share.stop, self.cfg.micro_batch):
            # Up to the first update of a step nothing has changed: what is unfinished can be left.
            if (phase != "critic" or step % self.cfg.ratio) and self.world.stops():
                raise InterruptedError
            samples = range(start, start + self.cfg.micro_batch)
            keys = (self.cfg.seed, phase)
            items = [
                order(len(self.prompts), step * self.cfg.batch + sample, str(keys))
                for sample in samples
            ]
            yield (
                Draws(self.device, samples, *keys, step),
                items,
                self.context([self.prompts[i] for i in items]),
            )

    def context(self, prompts: list[str]) -> Tensor:
        return self.text.batch(prompts, self.generator.cfg.text_len).to(self.device, self.dtype)

    def clips(self, items: list[int]) -> Tensor:
        """Clean latents: the data's, or the ends of trajectories."""
        clips = [
            row["x"][-1] if "x" in row else row["latent"]
            for row in map(self.store.__getitem__, items)
        ]
        return torch.stack(clips).to(self.device, torch.float32)

    def shape(self, frames: int) -> tuple[int, ...]:
        return (self.generator.cfg.in_dim, frames, self.cfg.height, self.cfg.width)

    def per_frame(self, per_block: Tensor, clean: float = 0) -> Tensor:
        """Levels (or their indices) [B, blocks] (or [B, 1] for all) -> [B, T], `clean` at a clean first frame."""
        sizes = torch.tensor(self.layout, device=self.device)
        level = per_block.expand(-1, len(sizes)).repeat_interleave(sizes, 1)
        level[:, : self.cfg.first] = clean
        return level

    def data_phase(self, step: int) -> dict[str, Tensor]:
        """teacher, ar, ode: the network against data."""
        losses, ode = [], self.cfg.stage == "ode"
        for batch in self.micro_batches(step, "ode" if ode else "flow"):
            loss = self.ode_loss(*batch) if ode else self.flow_loss(*batch)
            loss.backward()
            losses.append(loss.detach())
        return {"loss": torch.stack(losses).mean(), "norm": self.update("generator", step)}

    def flow_loss(self, draws: Draws, items: list[int], context: Tensor) -> Tensor:
        """teacher and ar: flow matching on real clips (Self Forcing's stage 1 is ar with teacher forcing)."""
        cfg = self.cfg
        x0, noise = self.clips(items), draws(torch.randn, *self.shape(cfg.frames))
        dropped = draws(torch.rand) < cfg.dropout
        context = torch.where(dropped[:, None, None], self.context([cfg.negative]), context)
        options = {"blocks": self.layout, "window": cfg.window or None} if cfg.stage == "ar" else {}
        if cfg.stage == "ar" and cfg.forcing == "teacher":
            options["clean"] = x0
        sigma = self.per_frame(
            shift_sigma(draws(torch.rand, len(self.layout) if cfg.stage == "ar" else 1), cfg.shift)
        )
        v = self.generator(add_noise(x0, noise, sigma), sigma, context, **options)
        error = (v.float() - (noise - x0)).square().mean((1, 3, 4))[:, cfg.first :]  # [B, T]
        return (
            error * ar_loss_weight(sigma[:, cfg.first :], cfg.shift) if cfg.bell else error
        ).mean()

    def ode_loss(self, draws: Draws, items: list[int], context: Tensor) -> Tensor:
        """Regression to ODE trajectories (CausVid, arXiv 2412.07772, section 4.3): x at a level -> its end.

        With clean context given apart no level is 0, where there is nothing to learn.
        """
        cfg, sigmas = self.cfg, torch.tensor(self.store.facts["sigmas"], device=self.device)
        x = torch.stack([self.store[i]["x"] for i in items]).to(self.device, torch.float32)
        chosen = (
            draws(torch.rand, len(self.layout)) * (len(sigmas) - (cfg.forcing == "teacher"))
        ).long()
        index = self.per_frame(chosen, clean=len(sigmas) - 1)
        end = x[:, -1]
        noisy = x.gather(1, index[:, None, None, :, None, None].expand(-1, 1, *end.shape[1:]))[:, 0]
        options = {"clean": end} if cfg.forcing == "teacher" else {}
        v = self.generator(
            noisy, sigmas[index], context, blocks=self.layout, window=cfg.window or None, **options
        )
        counted = (sigmas[index] > 0).float()
        error = (x0_from_v(noisy, v, sigmas[index]) - end).square().mean((1, 3, 4))
        return (
            (error * counted).sum(1) / counted.sum(1).clamp(min=1)
        ).mean()  # per sample: of no micro-batch

    @torch.no_grad()
    def generate(self, step: int, phase: str, draws: Draws, items: list[int], context: Tensor):
        """A rollout without grad -> (given frames or none, x0 [B, C, T, H, W], its trace, exit level).

        With context = "data", the paper's baseline, one block is generated, behind the real frames of a clip.
        """
        cfg, trace, blocks, given = self.cfg, [], self.blocks, self.cfg.first
        chance = rng("cpu", cfg.seed, phase, step, "exit")  # the same on all processes
        exit_step = int(torch.randint(len(self.sigmas) - 1, (), generator=chance))
        if cfg.context == "data":
            chosen = int(torch.randint(len(blocks), (), generator=chance))
            given, blocks = given + sum(blocks[:chosen]), blocks[chosen : chosen + 1]
        first = self.clips(items)[:, :, :given] if given else None
        self.cache.reset()
        noise, sources = (
            draws(torch.randn, *self.shape(sum(blocks))),
            (self.sigmas, blocks, self.cache),
        )
        options = {
            "exit_step": exit_step,
            "trace": trace,
            "renoise": lambda b, s, x: draws(torch.randn, *x.shape[1:]),
        }
        with self.world.gathered(self.generator):
            steps = rollout(self.generator, noise, context, *sources, first=first, **options)
            x0 = torch.cat(list(itertools.islice(steps, len(blocks))), 2)  # no commit of the last
        return first, x0, trace, exit_step

    def noised(self, draws: Draws, first: Tensor | None, x0: Tensor):
        """x0 behind the given frames at one random level a sample (DMD2): (xs, level [B, T], noise)."""
        whole = x0 if first is None else torch.cat([first, x0], 2)
        noise = draws(torch.randn, *whole.shape[1:])
        level = self.per_frame(shift_sigma(draws(torch.rand, 1), self.cfg.shift).clamp(0.02, 0.98))[
            :, : whole.shape[2]
        ]
        return add_noise(whole, noise, level), level, noise

    def generator_phase(self, step: int) -> dict[str, Tensor]:
        """One DMD or SiD step of the generator on its own rollouts (Self Forcing, algorithm 1)."""
        cfg, rows = self.cfg, []
        negative = self.context([cfg.negative] * cfg.micro_batch)
        for draws, items, context in self.micro_batches(step, "generator"):
            first, x0, trace, exit_step = self.generate(step, "generator", draws, items, context)
            x0.requires_grad_()
            with torch.set_grad_enabled(cfg.stage == "sid"):
                xs, level, _ = self.noised(draws, first, x0)

                def estimate(model, text, xs=xs, level=level, frames=x0.shape[2]):
                    return x0_from_v(xs, model(xs, level, text), level)[:, :, -frames:]

                fake, real = estimate(self.critic, context), estimate(self.teacher, context)
                unconditional = estimate(self.teacher, negative) if cfg.guidance else real
            scores = (fake, real, unconditional, cfg.guidance)
            gradient = dmd_gradient(x0, *scores)
            loss = (
                dmd_loss(x0, gradient) if cfg.stage == "dmd" else sid_loss(x0, *scores, cfg.alpha)
            )
            (grad,) = torch.autograd.grad(loss, x0)
            replay(self.generator, context, self.sigmas[exit_step], trace, self.cache).backward(
                grad
            )
            x0 = x0.detach()
            row = {"loss": loss.detach().float(), "gradient": gradient.abs().mean()}
            row["x0_motion"] = x0.var(
                2, correction=0
            ).mean()  # over time: a static video shows here
            for i, block in enumerate(x0.split([x.shape[2] for x in trace], 2)):
                row |= {f"x0_mean_{i}": block.mean(), f"x0_std_{i}": block.std()}
            rows.append(row)
        return average(rows) | {"norm": self.update("generator", step)}

    def critic_phase(self, step: int) -> dict[str, Tensor]:
        """One flow-matching step of the critic on the generator's rollouts."""
        rows = []
        for draws, items, context in self.micro_batches(step, "critic"):
            first, x0, _, _ = self.generate(step, "critic", draws, items, context)
            xs, level, noise = self.noised(draws, first, x0)
            v, noise = (x[:, :, -x0.shape[2] :] for x in (self.critic(xs, level, context), noise))
            loss = critic_loss(v, x0, noise)
            loss.backward()
            error = (v.detach().float() - (noise - x0)).square().mean((1, 2, 3, 4))
            high = (
                level[:, -1] > 0.8
            ).float()  # loss at high levels: critic_high / critic_share_high
            row = {
                "critic_loss": loss.detach(),
                "critic_high": (high * error).mean(),
                "critic_share_high": high.mean(),
            }
            rows.append(row)
        return average(rows) | {"critic_norm": self.update("critic", step)}

    def update(self, who: str, step: int) -> Tensor:
        """The optimizer's step, after all micro-batches; returns the gradient norm."""
        cfg, optimizer = self.cfg, self.optimizers[who]
        decay = 0.5 * (1 + math.cos(math.pi * step / cfg.steps)) if cfg.decay else 1.0
        base = cfg.lr if who == "generator" else cfg.critic_lr
        optimizer.lr = base * decay * min(1.0, (step + 1) / (cfg.warmup + 1))
        micro_batches = len(self.world.share(cfg.batch)) // cfg.micro_batch
        return optimizer.step(
            1 / micro_batches, cfg.clip, cfg.ema if step >= cfg.ema_start else 0.0
        )

    def iteration(self, step: int) -> dict[str, Tensor]:
        if not self.distilling:
            return self.data_phase(step)
        metrics = self.generator_phase(step) if step % self.cfg.ratio == 0 else {}
        return metrics | self.critic_phase(step)


def average(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]).mean() for key in rows[0]}

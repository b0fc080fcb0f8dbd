"""Training at the size of the 5B with random weights: whole iterations of a stage, train.py's own.

    python tools/bench_training.py --stage dmd                   # one H200
    python tools/bench_training.py --stage dmd --offload         # one H100 80 GB
    python tools/bench_training.py --stage dmd --offload --compile --keep-attention   # dmd-5b.toml
    python tools/bench_training.py --stage dmd --offload --compile --gan    # gan-5b.toml; or --dfd
    python tools/bench_training.py --levels-after 1000 500 --no-clean-pass   # 4, then 2 levels
    python tools/bench_training.py --stage ar --iterations 4     # teacher forcing: twice the tokens
    python tools/bench_training.py --lora 128 --compile --keep-attention   # dmd-lora-5b.toml
    python tools/bench_training.py --lora 128 --compile --size 480x832 --no-merge   # for 24 GB
    python tools/bench_training.py --release /tmp/x --frames 3   # from a release on disk (20 GB)
    python tools/bench_training.py --preset tiny --device cpu --size 64x64 --frames 9

    torchrun --nproc_per_node=8 tools/bench_training.py --batch 16   # the losses of one process
    torchrun --nproc_per_node=8 tools/bench_training.py --batch 16 --shard 4   # two replicas

Figures are means without the first of each kind, over exit levels as they were drawn. Their mean is
1.5 in the long run, and with the seed that is set also in runs of --ratio 1 --iterations 3 (or 5).
FLOP are arithmetic (wan5b/extras/budget.py): "work" with what is done twice (checkpointing's
recomputation, a rollout's last level in the replay, the scores in attention's backward), "MFU"
without. Percentages are of a large matrix product, measured in the same call. With several
processes all but losses and norms is the first one's, FLOP and memory included.
Set-up is what train.py does before its first step, here with random weights made on the
device, or those of a release, page cache warm.
"""

import argparse
import contextlib
import math
import os
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from bench_loading import PeakMemory
from release import write_dit

import train
from wan5b import stages
from wan5b.distill import critic_loss
from wan5b.dit import PRESETS, DiTConfig, WanDiT
from wan5b.extras import checkpoints, compiler
from wan5b.extras.adapters import flop_share
from wan5b.extras.budget import (
    GIB,
    FlopCount,
    forward_flop,
    matmul_rate,
    memory_gib,
    recomputed_flop,
)
from wan5b.extras.cli import script
from wan5b.extras.merging import merges_rollouts
from wan5b.extras.shards import write_shard
from wan5b.flow import few_step_sigmas
from wan5b.fsdp import World
from wan5b.runs import Batch, Run, micro_batches
from wan5b.stages import Noised, Rolled, roll_out, update

PROMPTS = [f"prompt {i}" for i in range(4)]
# Of whose masters it is told how far they move: of a network's, or of an adapter's.
WATCHED = ("blocks.0.ffn.0.weight", "blocks.0.ffn.0.lora_B.weight")
Tensors = dict[str, Tensor]

# ------------------------------------------------------------------------------------------ options


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--stage", default="dmd", choices=stages.STAGES)
    add("--preset", default="ti2v-5B", choices=PRESETS)
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--size", default="704x1280", help="in pixels")
    add("--frames", type=int, default=21, help="latent frames")
    add("--batch", type=int, default=2, help="samples of a phase, over all processes")
    add("--micro-batch", type=int, default=1, help="samples of a forward")
    text = "processes that share one copy of the weights; 0: those of a node"
    add("--shard", type=int, default=0, help=text)
    add("--ratio", type=int, default=5, help="critic phases for one of the generator")
    text = "default: two generator phases, or three of the other stages"
    add("--iterations", type=int, help=text)
    add("--lr", type=float, default=1e-5, help="of both networks")
    add("--seed", type=int, default=240, help="of all draws, exit levels among them")
    add("--forcing", default="teacher", choices=["teacher", "diffusion"])
    add("--gan", action="store_true", help="dmd: the GAN branch; its clips are random numbers")
    text = "with --gan: of logits against their clip's"
    add("--relativistic", action="store_true", help=text)
    add("--slopes", action="store_true", help="with --gan: R1 and R2, two forwards more")
    add("--dfd", action="store_true", help="dmd: the teacher scores clips in all steps")
    text = "adapters of this rank over one base, which is the teacher; 0: all weights"
    add("--lora", type=int, default=0, metavar="RANK", help=text)
    add("--no-merge", action="store_true", help="with --lora: rollouts over base and adapters")
    text = "dmd, sid: levels of the chunks behind the first, in thousandths"
    add("--levels-after", type=int, nargs="+", default=[], metavar="LEVEL", help=text)
    text = "dmd, sid: the last level's keys are a chunk's context"
    add("--no-clean-pass", action="store_true", help=text)
    add("--offload", action="store_true", help="the optimizers' state in host memory")
    add("--compile", action="store_true", help="fuse small operations")
    text = "checkpointing keeps the results of self-attention"
    add("--keep-attention", action="store_true", help=text)
    text = "ar, ode: chunk by chunk, without a mask"
    add("--split-attention", action="store_true", help=text)
    add("--no-checkpointing", action="store_true")
    text = "at the end write a checkpoint there, with its bytes and seconds"
    add("--save", type=Path, metavar="DIR", help=text)
    text = "start all networks from it; made, with random weights, if missing"
    add("--release", type=Path, metavar="DIR", help=text)
    args = parser.parse_args(argv)
    if args.save and args.save.exists():
        raise ValueError(f"--save {args.save} exists; name a new folder")
    return args


def dtype_of(args: argparse.Namespace) -> str:
    return "bfloat16" if args.device == "cuda" else "float32"


def make_config(args: argparse.Namespace, stores: dict[str, str]) -> train.Config:
    """The run's config. stores: those of `make_data`."""
    options = dict(stores)
    same = ("stage", "preset", "frames", "batch", "micro_batch", "ratio", "lr", "forcing")
    same += ("seed", "lora", "device", "offload", "keep_attention", "split_attention")
    for name in same:
        options[name] = getattr(args, name)
    if args.release:
        options["weights"] = str(args.release)
        if args.stage in stages.DISTILLATIONS:
            options["teacher"] = str(args.release)

    if args.gan:
        options["gan_weight"] = 0.01
        options["gan_relativistic"] = args.relativistic
        options["gan_r1"] = options["gan_r2"] = 0.01 * args.slopes
    options["data_forcing"] = float(args.dfd)

    height, width = latent_size(args.size)
    return train.Config(
        out="unused",
        negative="negative",
        height=height,
        width=width,
        critic_lr=args.lr,
        ema_start=0,
        dtype=dtype_of(args),
        compile=args.compile,
        checkpointing=not args.no_checkpointing,
        levels_after=tuple(args.levels_after),
        clean_pass=not args.no_clean_pass,
        lora_merge=not args.no_merge,
        **options,
    )


def latent_size(size: str) -> tuple[int, int]:
    """ "704x1280", in pixels -> (44, 80)"""
    height, width = size.split("x")
    return int(height) // 16, int(width) // 16


# ------------------------------------------------------------------------------------------- set-up


def make_data(
    folder: Path, stage: str, sizes: DiTConfig, shape: tuple[int, ...], clips: bool = False
) -> dict[str, str]:
    """Stores of random numbers in the shapes of real ones -> the config's keys that name them.

    They are always the same. shape: of a clip's latents, [C, T, H, W]. clips: a distillation has
    some too.
    """
    torch.manual_seed(0)
    lengths = torch.randint(sizes.text_len // 8, sizes.text_len + 1, (len(PROMPTS) + 1,))
    rows = torch.randn(int(lengths.sum()), sizes.text_dim).bfloat16()
    texts = {"rows": rows, "lengths": lengths}
    write_shard(folder / "text" / "0.safetensors", texts, [*PROMPTS, "negative"])
    stores = {"text": str(folder / "text")}
    if stage in stages.DISTILLATIONS and not clips:
        return stores

    sigmas = few_step_sigmas()
    if stage == "ode":
        kind = "trajectories"
        made = {"x": torch.randn(len(PROMPTS), len(sigmas), *shape)}
    else:
        kind = "latents"
        made = {"latent": torch.randn(len(PROMPTS), *shape)}
    write_shard(folder / kind / "0.safetensors", made, PROMPTS, sigmas=sigmas)
    stores[kind] = str(folder / kind)
    return stores


def random_weights(sizes: DiTConfig, device, dtype: torch.dtype, seed: int) -> Tensors:
    """Made on the device, where it takes a second."""
    with torch.device("meta"):
        model = WanDiT(sizes).to(dtype)
    model = model.to_empty(device=device)
    return model.init_weights(torch.Generator(device).manual_seed(seed)).state_dict()


def make_release(args: argparse.Namespace) -> None:
    args.release.mkdir(parents=True)
    sizes = PRESETS[args.preset]
    weights = random_weights(sizes, args.device, torch.float32, seed=0)
    write_dit(args.release, sizes, weights=weights)


def build(cfg: train.Config, world: World) -> Run:
    """As train.build does it, but for random weights and for the memory that only saving takes."""
    make_network = train.network
    make_budget = train.expected

    def network(cfg, world: World, who: str, path: str, sizes: DiTConfig, tensors: Tensors):
        seed = 0 if who in ("generator", "base") else 1  # the critic starts as the teacher
        if not tensors:
            tensors = random_weights(sizes, world.device, getattr(torch, cfg.dtype), seed)
        return make_network(cfg, world, who, path, sizes, tensors)

    def expected(*arguments) -> dict[str, dict[str, float]]:
        budget = make_budget(*arguments)
        if "host" in budget:
            budget["host"].pop("masters while saving", None)  # nothing is saved here
        return budget

    def check_run(*_) -> None:
        """Room for a checkpoint is not needed either."""

    with patch.multiple(train, network=network, expected=expected, check_run=check_run):
        return train.build(cfg, world)


# ---------------------------------------------------------------------------------------- measuring


class RepeatedFlop:
    """FLOP that the networks it watches do a second time: a part of what FlopCount counts."""

    def __init__(self):
        self.done = 0.0

    def watch(self, model: WanDiT) -> None:
        count = partial(self._count, flop_share(model))
        model.register_forward_pre_hook(count, with_kwargs=True)

    def _count(self, share: float, model: WanDiT, args: tuple, options: dict) -> None:
        """share: the adapters' part, of the projections'."""
        if not torch.is_grad_enabled():
            return
        linear, attention = forward_flop(model.cfg, args[0], **options)
        self.done += recomputed_flop(model, args[0], share, **options)
        if "cache" in options:  # a replay, of what the rollout has done
            beside = 0 if merges_rollouts(model) else share
            self.done += (1 + beside) * linear + attention
        self.done += 0.5 * attention  # the scores, in the backward


class Clock:
    """Seconds, FLOP and repeated FLOP of an iteration's parts, noted from outside.

    Inside `with clock.watching()` three of its methods stand in the place of the functions of
    wan5b/stages.py that have their names, and call these. A phase begins with its first micro-batch
    and ends with its optimizer's step.

    rows: for every part, by name, the three figures of each time it ran.
    exits: the exit levels that were drawn, by phase.
    """

    def __init__(self, run: Run):
        self.device = torch.get_device_module(run.device)
        self.flop = FlopCount()
        self.repeated = RepeatedFlop()
        for model in (run.generator, run.critic, run.teacher):
            if model is not None:
                self.flop.watch(model)
                self.repeated.watch(model)
        self.rows: dict[str, list[np.ndarray]] = defaultdict(list)
        self.exits: dict[str, list[int]] = defaultdict(list)
        self.phase = ""  # the one that is running
        self.phase_began = np.zeros(3)

    def watching(self):
        return patch.multiple(
            stages,
            micro_batches=self.micro_batches,
            roll_out=self.roll_out,
            update=self.update,
        )

    def now(self) -> np.ndarray:
        """Seconds, FLOP and repeated FLOP so far, once the device has done what it was given."""
        self.device.synchronize()
        return np.array([time.perf_counter(), self.flop.done, self.repeated.done])

    def micro_batches(self, run: Run, phase: str, step: int, moved: bool) -> Iterator[Batch]:
        self.phase = phase
        self.phase_began = self.now()
        yield from micro_batches(run, phase, step, moved)

    def roll_out(self, run: Run, batch: Batch) -> Rolled:
        began = self.now()
        rolled = roll_out(run, batch)
        self.rows[f"  a rollout, {self.phase}"].append(self.now() - began)
        self.exits[self.phase].append(rolled.exit_step)
        return rolled

    def exit_level(self, phase: str) -> float:
        """Of the last chunk, on average: over those times that `means` counts."""
        drawn = self.exits[phase]
        first = len(drawn) // len(self.rows[f"{phase} phase"])  # of the phase's first time
        return float(np.mean(drawn[first:] or drawn))

    def update(self, run: Run, network: str, step: int) -> Tensor:
        began = self.now()
        norm = update(run, network, step)
        # The slowest process's: the others would wait for it in what comes next.
        self.device.synchronize()
        run.world.barrier()
        ended = self.now()
        self.rows[f"  optimizer, {network}"].append(ended - began)
        name = f"{self.phase} phase" if run.critic else "phase"
        self.rows[name].append(ended - self.phase_began)
        return norm

    def counted(self) -> dict[str, np.ndarray]:
        """Of every part [times, 3], without its first time if there are more."""
        return {name: np.array(rows[1:] or rows) for name, rows in self.rows.items()}

    def means(self) -> dict[str, np.ndarray]:
        """Of every part, over the times that are counted."""
        return {name: rows.mean(0) for name, rows in self.counted().items()}


def iterate(run: Run, clock: Clock, iterations: int) -> list[str]:
    """Iterations between two looks at the loss on a batch that stays the same.

    Returns what became of losses and masters, in words.
    """
    watched = WATCHED[run.cfg.lora > 0]
    before = {name: optimizer.master(watched).clone() for name, optimizer in run.optimizers.items()}
    if run.critic is None:
        loss = partial(data_loss, run)
    else:
        loss = partial(loss_of_critic, run, fixed_rollouts(run))

    first = run.world.mean({"loss": loss()})["loss"]
    finite = True
    for step in range(iterations):
        with clock.watching():
            values = run.world.mean(stages.iteration(run, step))
        finite = finite and all(math.isfinite(value) for value in values.values())
        shown = [f"{key} {value:.4g}" for key, value in values.items() if "x0" not in key]
        print(f"iteration {step}:", *shown, flush=True)
    last = run.world.mean({"loss": loss()})["loss"]

    changes = []
    for name, optimizer in run.optimizers.items():
        moved = (optimizer.master(watched) - before[name]).abs()
        share = (moved > 0).float().mean().item()
        changes.append(f"{name} {share:.1%} by {moved.mean().item():.2g}")
    return [
        f"losses and gradients finite: {finite}; loss on a fixed batch: {first:.5f} -> {last:.5f}",
        f"masters of {watched} that moved, and how far on average: {', '.join(changes)}",
    ]


@torch.no_grad()
def data_loss(run: Run) -> Tensor:
    """Of teacher, ar or ode on a batch that stays the same: the step without its backward."""
    (phase,) = stages.PHASES[run.cfg.stage]
    losses = []
    with patch.object(stages, "backward", lambda loss: {"loss": loss}):
        for batch in micro_batches(run, "fixed", 0, moved=False):
            losses.append(phase.step(run, batch)["loss"])
    return torch.stack(losses).mean()


@torch.no_grad()
def fixed_rollouts(run: Run) -> list[tuple[Tensor, Tensor, Noised]]:
    """As many as a phase has, by the generator as it is now: context, x0, and x0 noised."""
    made = []
    for batch in micro_batches(run, "fixed", 0, moved=False):
        rolled = roll_out(run, batch)
        made.append((batch.context, rolled.x0, stages.noise_again(run, batch, rolled)))
    return made


@torch.no_grad()
def loss_of_critic(run: Run, rollouts: list[tuple[Tensor, Tensor, Noised]]) -> Tensor:
    losses = []
    for context, x0, noised in rollouts:
        v = run.critic(noised.xs, noised.sigma, context)
        losses.append(critic_loss(v, x0, noised.noise))
    return torch.stack(losses).mean()


# ---------------------------------------------------------------------------------------- reporting


def print_parts(clock: Clock, ratio: int, ceiling: float) -> None:
    """The table of an iteration's parts. ceiling: FLOP/s of a matrix product."""
    means = clock.means()
    times = {name: len(rows) for name, rows in clock.rows.items()}
    slowest = {name: f"{rows[:, 0].max():.3f}" for name, rows in clock.counted().items()}
    if "critic phase" in means:
        whole = f"generator + {ratio} critic"
        means[whole] = means["generator phase"] + ratio * means["critic phase"]
        times[whole] = 1
        slowest[whole] = "-"

    columns = f"{'times':>6}{'seconds':>9}{'slowest':>9}{'TFLOP':>11}{'work':>8}{'MFU':>8}"
    print(f"{'':26}{columns}")
    for name, (seconds, flop, repeated) in means.items():
        work = flop / seconds / ceiling
        mfu = (flop - repeated) / seconds / ceiling
        measured = f"{times[name]:6}{seconds:9.3f}{slowest[name]:>9}{flop / 1e12:11.4g}"
        print(f"{name:26}{measured}{work:8.1%}{mfu:8.1%}")


def print_distillation(clock: Clock, own: int, devices: int, ceiling: float) -> None:
    """What the phases come to. own: samples of a phase on a device. ceiling: as `print_parts`."""
    means = clock.means()
    optimizer = {}
    sample = {}
    for name in ("generator", "critic"):
        optimizer[name] = float(means[f"  optimizer, {name}"][0])
        sample[name] = (float(means[f"{name} phase"][0]) - optimizer[name]) / own
    shown = ", ".join(f"{phase} {clock.exit_level(phase):.2f}" for phase in sample)
    print(f"exit level (last chunk) on average: {shown}; seconds of a sample: {sample}")
    average = optimizer["generator"] - optimizer["critic"]
    print(f"average: {average:.3f} s of the generator's optimizer step")

    # Whole runs, at batch 64 and a ratio of 5.
    share = 64 / devices
    step = {name: share * sample[name] + optimizer[name] for name in sample}
    seconds = step["generator"] + 5 * step["critic"]
    flop, repeated = share / own * (means["generator phase"] + 5 * means["critic phase"])[1:]
    work = flop / seconds / ceiling
    mfu = (flop - repeated) / seconds / ceiling
    print(f"generator + 5 critic at batch 64: {seconds:.1f} s, work {work:.1%}, MFU {mfu:.1%}")
    for critic_steps in (3000, 600):
        generator_steps = critic_steps // 5
        seconds = generator_steps * step["generator"] + critic_steps * step["critic"]
        days = seconds / 86400
        print(
            f"{generator_steps} generator and {critic_steps} critic steps at batch 64: "
            f"{days:.2f} days; {days * devices / 8:.2f} on 8 devices, if they scaled ideally"
        )


def print_memory(run: Run) -> None:
    peak = memory_gib(run.device)
    expected = sum(run.budget["device"].values()) / GIB
    off = peak / expected - 1
    print(f"peak on the device {peak:.2f} GiB, expected {expected:.2f} ({off:+.1%})")
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    locked = sum(len(optimizer.storage.memory) for optimizer in run.optimizers.values()) / GIB
    print(f"peak on the host {host:.2f} GiB, of it page-locked {locked:.2f}")


def print_save(run: Run, folder: Path) -> None:
    """A checkpoint as train.py writes it, and its bytes; all processes take part."""
    began = time.perf_counter()
    path = checkpoints.save(run.world, folder, run.optimizers, {"step": 1})
    seconds = time.perf_counter() - began
    size = sum(file.stat().st_size for file in path.iterdir()) / 1e9
    print(f"a checkpoint: {size:.2f} GB, {seconds:.1f} s")


def print_allocator() -> None:
    figures = torch.cuda.memory_stats()
    taken = figures.get("reserved_bytes.all.peak", 0) / GIB
    again = figures.get("num_alloc_retries", 0)
    print(
        f"the allocator took up to {taken:.1f} GiB of the device, "
        f"{again} times only after freeing some"
    )


# --------------------------------------------------------------------------------------------- main


def measure(args: argparse.Namespace, world: World) -> None:
    if world.rank:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the first process speaks for all
    elif args.release and not args.release.exists():
        make_release(args)
    world.barrier()
    ceiling = matmul_rate(world.device, getattr(torch, dtype_of(args)))
    distilling = args.stage in stages.DISTILLATIONS

    with tempfile.TemporaryDirectory() as folder:
        sizes = PRESETS[args.preset]
        shape = (sizes.in_dim, args.frames, *latent_size(args.size))
        clips = args.gan or args.dfd
        stores = make_data(Path(folder), args.stage, sizes, shape, clips)

        # Set-up.
        start = time.perf_counter()
        with PeakMemory() as private:
            run = build(make_config(args, stores), world)
            torch.get_device_module(world.device).synchronize()
            setup = time.perf_counter() - start
        if args.device == "cuda":
            # Making the networks takes tensors of its own.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

        # Iterations.
        clock = Clock(run)
        iterations = args.iterations or (args.ratio + 1 if distilling else 3)
        outcome = iterate(run, clock, iterations)
        if args.save:
            print_save(run, args.save)

    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"\n{world.size} x {name}, torch {torch.__version__}, {vars(args)}")
    print(f"matrix product {ceiling / 1e12:.3g} TFLOP/s")
    print_parts(clock, args.ratio, ceiling)
    if distilling:
        print_distillation(clock, args.batch // world.size, world.size, ceiling)
    print_memory(run)
    print(*outcome, sep="\n")
    if args.device == "cuda":
        print_allocator()
    print(
        f"set-up {setup:.1f} s, private host memory up to {private.bytes / GIB:.2f} GiB in it, "
        "page-locked included"
    )


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    compiler.enable(args.compile)
    with contextlib.closing(World(args.device, args.shard)) as world:
        measure(args, world)


if __name__ == "__main__":
    script(main)

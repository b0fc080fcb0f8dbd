"""Training at the size of the 5B with random weights: whole iterations of a stage through the Run of train.py.

    python tools/bench_training.py --stage dmd                 # one H200
    python tools/bench_training.py --stage dmd --offload       # one H100 80 GB
    python tools/bench_training.py --stage ar --iterations 4   # teacher forcing: twice the tokens, flex_attention
    python tools/bench_training.py --release /tmp/x --frames 3   # from a release on disk (20 GB), made if not there
    torchrun --nproc_per_node=8 tools/bench_training.py --batch 16      # the losses are those of one process
    torchrun --nproc_per_node=8 tools/bench_training.py --batch 16 --shard 4   # two replicas over four devices each
    python tools/bench_training.py --preset tiny --device cpu --size 64x64 --frames 9     # shows that it runs

Figures are means without the first of each kind, over exit levels as they were drawn (their mean, 1.5 in the long run,
is printed). FLOP are arithmetic (wan5b/stages.py: forward_flop): "work" with what is done twice (checkpointing's
recomputation, a rollout's last level in the replay, the scores in attention's backward), "MFU" without. Percentages are
of a large matrix product, measured in the same call. With several processes all but losses and norms is the first
one's, FLOP and memory included. Set-up is what train.py does before its first step, here with random weights made on
the device or those of a release, page cache warm.
"""

import argparse
import math
import os
import resource
import sys
import tempfile
import threading
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from bench_loading import peak_memory
from release import write_dit

from train import Config, matmul_rate, memory_gib
from wan5b import fuse
from wan5b.data import write_shard
from wan5b.distill import critic_loss
from wan5b.dit import PRESETS, WanDiT
from wan5b.extras.offload import HostStorage
from wan5b.flow import few_step_sigmas
from wan5b.fsdp import World
from wan5b.stages import GIB, Run, forward_flop
from wan5b.util import script

PROMPTS = [f"prompt {i}" for i in range(4)]


def make_data(folder: Path, stage: str, dit, shape: tuple[int, ...]) -> dict[str, str]:
    """Stores of random numbers in the shapes of real ones -> the config's keys that name them. Always the same."""
    torch.manual_seed(0)
    lengths = torch.randint(dit.text_len // 8, dit.text_len + 1, (len(PROMPTS) + 1,))
    rows = torch.randn(int(lengths.sum()), dit.text_dim).bfloat16()
    write_shard(
        folder / "text/0.safetensors", {"rows": rows, "lengths": lengths}, [*PROMPTS, "negative"]
    )
    if stage in ("dmd", "sid"):
        return {"text": str(folder / "text")}
    kind, name, levels = (
        ("trajectories", "x", (5,)) if stage == "ode" else ("latents", "latent", ())
    )
    clips = torch.randn(len(PROMPTS), *levels, *shape)
    write_shard(folder / kind / "0.safetensors", {name: clips}, PROMPTS, sigmas=few_step_sigmas())
    return {"text": str(folder / "text"), kind: str(folder / kind)}


def random_dit(cfg, device, dtype: torch.dtype, seed: int) -> WanDiT:
    """Random weights made on the device, where it takes a second."""
    with torch.device("meta"):
        model = WanDiT(cfg).to(dtype)
    return model.to_empty(device=device).init_weights(torch.Generator(device).manual_seed(seed))


class Measured(Run):
    """A run that notes seconds, FLOP and repeated FLOP of its parts; its networks are random if it is given none."""

    def __init__(self, *arguments):
        self.taken, self.exits, self.repeated, self.seeds = (
            defaultdict(list),
            [],
            0.0,
            iter((0, 1, 1)),
        )
        super().__init__(*arguments)

    def network(self, cfg, tensors):
        seed = next(self.seeds)  # the critic starts as the teacher
        return super().network(
            cfg, tensors or random_dit(cfg, self.device, self.dtype, seed).state_dict()
        )

    def expected(self, *networks):
        budget = super().expected(*networks)
        budget.get("host", {}).pop("masters while saving", None)  # nothing is saved here
        return budget

    def _count(self, model, args, options):
        super()._count(model, args, options)
        linear, attention = forward_flop(model.cfg, args[0], **options)
        if torch.is_grad_enabled():
            twice = model.checkpointing + ("cache" in options)
            self.repeated += twice * (linear + attention) + 0.5 * attention

    def clock(self, name, call, *arguments):
        device, flop, repeated = torch.get_device_module(self.device), self.flop, self.repeated
        device.synchronize()
        start = time.perf_counter()
        result = call(*arguments)
        device.synchronize()
        self.taken[name].append(
            (time.perf_counter() - start, self.flop - flop, self.repeated - repeated)
        )
        return result

    def generator_phase(self, step):
        return self.clock("generator phase", super().generator_phase, step)

    def critic_phase(self, step):
        return self.clock("critic phase", super().critic_phase, step)

    def data_phase(self, step):
        return self.clock("phase", super().data_phase, step)

    def generate(self, step, phase, *rest):
        result = self.clock(f"  a rollout, {phase}", super().generate, step, phase, *rest)
        self.exits.append(result[-1])
        return result

    def update(self, who, step):
        return self.clock(f"  optimizer, {who}", super().update, who, step)

    @torch.no_grad()
    def fixed_batch(self):
        """-> a function of no arguments: the loss, of the critic where there is one, on a batch that stays the same.

        As many samples as a phase has; the critic's are those that the generator makes now.
        """
        if not self.distilling:
            loss = self.ode_loss if self.cfg.stage == "ode" else self.flow_loss
            return lambda: torch.stack(
                [loss(*batch) for batch in self.micro_batches(0, "fixed")]
            ).mean()
        made = []
        for draws, items, context in self.micro_batches(0, "fixed"):
            first, x0, _, _ = Run.generate(self, 0, "fixed", draws, items, context)
            made.append((context, x0, *self.noised(draws, first, x0)))

        def loss():
            parts = [
                critic_loss(self.critic(xs, level, text), x0, noise)
                for text, x0, xs, level, noise in made
            ]
            return torch.stack(parts).mean()

        return loss


def train(run: Measured, iterations: int) -> list[str]:
    """Iterations between two looks at the loss on a fixed batch -> what became of losses and masters, in words."""
    optimizers, watched, losses, finite = run.optimizers.items(), "blocks.0.ffn.0.weight", [], True
    before = {who: optimizer.master(watched).clone() for who, optimizer in optimizers}
    loss = run.fixed_batch()
    for step in range(iterations + 1):
        if step in (0, iterations):
            with torch.no_grad():
                losses.append(run.world.mean({"loss": loss()})["loss"])
        if step < iterations:
            values = run.world.mean(run.iteration(step))
            finite &= all(map(math.isfinite, values.values()))
            print(
                f"iteration {step}:",
                *(f"{k} {v:.4g}" for k, v in values.items() if "x0" not in k),
                flush=True,
            )
    moved = {who: (optimizer.master(watched) - before[who]).abs() for who, optimizer in optimizers}
    changes = (
        f"{who} {float((d > 0).float().mean()):.1%} by {float(d.mean()):.2g}"
        for who, d in moved.items()
    )
    return [
        f"losses and gradients finite: {finite}; loss on a fixed batch: {losses[0]:.5f} -> {losses[1]:.5f}",
        f"masters of {watched} that moved, and how far on average: {', '.join(changes)}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--stage", default="dmd", choices=["teacher", "ar", "ode", "dmd", "sid"])
    add("--preset", default="ti2v-5B", choices=PRESETS)
    add("--device", default="cuda", choices=["cuda", "cpu"])
    add("--size", default="704x1280", help="in pixels")
    add("--frames", type=int, default=21, help="latent frames")
    add("--batch", type=int, default=2, help="samples of a phase, over all processes")
    add("--micro-batch", type=int, default=1, help="samples of a forward")
    add(
        "--shard",
        type=int,
        default=0,
        help="processes that share one copy of the weights; 0: those of a node",
    )
    add("--ratio", type=int, default=5)
    add(
        "--iterations", type=int, help="default: two generator phases, or three of the other stages"
    )
    add("--lr", type=float, default=1e-5, help="of both networks")
    add("--forcing", default="teacher", choices=["teacher", "diffusion"])
    add("--offload", action="store_true")
    add("--compile", action="store_true", help="what runs without grad")
    add("--no-checkpointing", action="store_true")
    add(
        "--release",
        type=Path,
        metavar="DIR",
        help="start all networks from it; made, with random weights, if missing",
    )
    args = parser.parse_args()
    height, width = (int(side) // 16 for side in args.size.split("x"))
    distilling, dit = args.stage in ("dmd", "sid"), PRESETS[args.preset]
    dtype = "bfloat16" if args.device == "cuda" else "float32"
    names = ("stage", "preset", "frames", "batch", "micro_batch", "ratio", "lr", "forcing")
    keys = {name: getattr(args, name) for name in names}
    keys |= {
        "out": "unused",
        "negative": "negative",
        "height": height,
        "width": width,
        "critic_lr": args.lr,
    }
    keys |= {"ema_start": 0, "device": args.device, "dtype": dtype, "offload": args.offload}
    if args.release:
        keys |= {"weights": str(args.release)} | (
            {"teacher": str(args.release)} if distilling else {}
        )
    fuse.enable(args.compile)
    world = World(args.device, args.shard)
    if world.rank:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    elif args.release and not args.release.exists():
        args.release.mkdir(parents=True)
        write_dit(
            args.release, dit, weights=random_dit(dit, args.device, torch.float32, 0).state_dict()
        )
    world.barrier()
    ceiling = matmul_rate(world.device, getattr(torch, dtype))
    with tempfile.TemporaryDirectory() as folder:
        stores = make_data(Path(folder), args.stage, dit, (dit.in_dim, args.frames, height, width))
        start, stop, private = time.perf_counter(), threading.Event(), [0]
        watch = threading.Thread(target=peak_memory, args=(stop, private))
        watch.start()
        cfg = Config(**keys, **stores, checkpointing=not args.no_checkpointing)
        offload = args.offload and args.device == "cuda"
        run = Measured(cfg, world, partial(HostStorage, world.device, offload))
        torch.get_device_module(world.device).synchronize()
        made = time.perf_counter() - start
        stop.set()
        watch.join()
        if args.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()  # making the networks takes tensors of its own
        report = train(run, args.iterations or (args.ratio + 1 if distilling else 3))

    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(
        f"\n{world.size} x {name}, torch {torch.__version__}, {vars(args)}\nmatrix product {ceiling / 1e12:.3g} TFLOP/s"
    )
    print(f"{'':26}{'times':>6}{'seconds':>9}{'TFLOP':>9}{'work':>8}{'MFU':>8}")
    means = {
        name: [sum(x) / len(x) for x in zip(*(rows[1:] or rows), strict=True)]
        for name, rows in run.taken.items()
    }
    times = {name: len(rows) for name, rows in run.taken.items()}
    if distilling:
        parts = zip(means["generator phase"], means["critic phase"], strict=True)
        means[f"generator + {args.ratio} critic"] = [a + args.ratio * b for a, b in parts]
    for name, (seconds, work, repeated) in means.items():
        mfu = work / seconds / ceiling, (work - repeated) / seconds / ceiling
        print(
            f"{name:26}{times.get(name, 1):6}{seconds:9.3f}{work / 1e12:9.4g}{mfu[0]:8.1%}{mfu[1]:8.1%}"
        )
    if distilling:
        optimizer = {who: means[f"  optimizer, {who}"][0] for who in run.optimizers}
        own = args.batch // world.size
        sample = {who: (means[f"{who} phase"][0] - optimizer[who]) / own for who in run.optimizers}
        print(
            f"exit level {sum(run.exits) / len(run.exits):.2f} on average; seconds of a sample on a device: {sample}"
        )
        print(
            f"average: {optimizer['generator'] - optimizer['critic']:.3f} s of the generator's optimizer step"
        )
        days = {
            who: 600 * (64 / world.size * sample[who] + optimizer[who]) / 86400 for who in sample
        }  # batch 64
        for updates in (5, 1):  # of the critic, in hundreds
            total = days["generator"] * updates / 5 + days["critic"] * updates
            print(
                f"{120 * updates} generator and {600 * updates} critic steps at batch 64: {total:.2f} days",
                end="",
            )
            print(f"; {total * world.size / 8:.2f} on 8 devices, if they scaled ideally")
    expected = {place: sum(parts.values()) / GIB for place, parts in run.budget.items()}
    peak, host = (
        memory_gib(world.device),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    )
    locked = sum(len(o.storage.memory) for o in run.optimizers.values()) / GIB
    print(
        f"peak on the device {peak:.2f} GiB, expected {expected['device']:.2f} ({peak / expected['device'] - 1:+.1%})"
    )
    print(f"peak on the host {host:.2f} GiB, of it page-locked {locked:.2f}", *report, sep="\n")
    if args.device == "cuda":
        taken, again = (
            torch.cuda.memory_stats().get(k, 0)
            for k in ("reserved_bytes.all.peak", "num_alloc_retries")
        )
        print(
            f"the allocator took up to {taken / GIB:.1f} GiB of the device, {again} times only after freeing some"
        )
    print(
        f"set-up {made:.1f} s, private host memory up to {private[0] / GIB:.2f} GiB in it, page-locked included"
    )
    world.close()


if __name__ == "__main__":
    script(main)

"""Train one stage: teacher, ar, ode, dmd or sid.

    python train.py configs/dmd-5b.toml                                    # one process
    torchrun --nproc_per_node=8 train.py configs/dmd-5b.toml batch=64      # a node; overrides
    torchrun --nnodes=2 --nproc_per_node=8 ... train.py configs/dmd-5b.toml  # sharded in each node

The same command again goes on from the newest checkpoint. Nothing random depends on the number of
processes: every draw comes from (seed, phase, step, sample).
"""

if __name__ == "__main__":
    from wan5b.extras import signals

    signals.while_loading()

import contextlib
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from wan5b import fsdp, fuse
from wan5b.data import Data
from wan5b.dit import PRESETS, DiTConfig, WanDiT
from wan5b.extras import log
from wan5b.extras.budget import GIB, FlopCount, afford, expected, free, matmul_rate, memory_gib
from wan5b.extras.checks import check_config, check_finished, check_fit, check_unchanged, held_by
from wan5b.extras.cli import DEVICES, script
from wan5b.extras.config import Options, at_least, one_of, path, read, within
from wan5b.extras.formats import load_vae, open_dit
from wan5b.extras.fp8_training import without_grad_in_fp8
from wan5b.extras.offload import HostStorage
from wan5b.extras.previews import sample_videos
from wan5b.extras.training_attention import arrange
from wan5b.flow import FEW_STEPS
from wan5b.kvcache import KVCache
from wan5b.optim import AdamW
from wan5b.stages import DISTILLATIONS, STAGES, Run, iteration
from wan5b.t5 import NEGATIVE_PROMPT
from wan5b.util import rng
from wan5b.weights import fill, save_dit

# In the progress line; metrics.jsonl has everything.
SHOWN = ("loss", "norm", "critic_loss", "critic_norm", "seconds", "tokens_per_second", "mfu", "gib")


@dataclass(frozen=True)
class Config(Options):
    """One run. Paths are of folders made by prepare.py, of a release, or of an export."""

    stage: str = one_of(STAGES, "")
    out: str = path()
    text: str = path()  # embeddings of all prompts
    weights: str = path()  # where the trained network starts; empty: random weights of `preset`
    preset: str = one_of(PRESETS, "tiny")
    teacher: str = path()  # dmd, sid: the frozen network; the critic starts from it too
    latents: str = path()  # teacher, ar; dmd and sid with prefix = 1
    trajectories: str = path()  # ode
    vae: str = path()  # for sample videos
    negative: str = NEGATIVE_PROMPT

    frames: int = at_least(1, 21)  # latent frames
    height: int = at_least(1, 44)  # of latents
    width: int = at_least(1, 80)
    chunk: int = at_least(1, 3)  # latent frames generated together
    prefix: int = one_of((0, 1), 0)  # 1: image to video, a clean first frame outside the loss
    window: int = at_least(0, 0)  # latent frames that a chunk sees, itself included; 0: all
    levels: tuple[int, ...] = FEW_STEPS  # of the few-step model, in thousandths before the shift
    shift: float = at_least(1e-6, 5.0)

    steps: int = at_least(1, 1000)
    batch: int = at_least(1, 64)  # over all processes
    micro_batch: int = at_least(1, 1)
    lr: float = at_least(0, 2e-6)
    critic_lr: float = at_least(0, 4e-7)
    warmup: int = at_least(0, 0)
    decay: bool = False  # cosine, to zero at the last step
    beta1: float = within(0, 1, 0.0)
    beta2: float = within(0, 1, 0.999)
    weight_decay: float = at_least(0, 0.01)
    clip: float = at_least(1e-6, 10.0)
    ema: float = within(0, 1, 0.99)  # 0: none
    ema_start: int = 200

    ratio: int = at_least(1, 5)  # critic updates per generator update
    # DMD convention: cond + g (cond - uncond), one less than the sampling convention's scale.
    guidance: float = 3.0
    alpha: float = 1.0  # sid
    dropout: float = within(0, 1, 0.1)  # teacher, ar: share of samples with the negative prompt
    bell: bool = True  # teacher, ar: weight the flow loss over levels
    forcing: str = one_of(("teacher", "diffusion"), "teacher")  # ar, ode: on clean, on noisy chunks
    # dmd, sid: "self", or "data": one chunk behind real frames (the paper's baseline)
    rollout: str = one_of(("self", "data"), "self")

    device: str = one_of(DEVICES[:2], DEVICES[0])
    dtype: str = one_of(
        ("bfloat16", "float32"), "bfloat16" if torch.cuda.is_available() else "float32"
    )
    checkpointing: bool = True
    keep_attention: bool = False  # checkpointing keeps its results: 2 D bytes a token and layer
    split_attention: bool = False  # ar, ode: chunk by chunk, on a GPU faster than under a mask
    fp8: bool = False  # dmd, sid: rollouts and scores, all that has no grad, in float8 (Hopper)
    compile: bool = False  # small operations are fused: half a minute, then a fifth off a step
    offload: bool = False  # the optimizers' state in host memory: 60 GB of a 5B's dmd leave the GPU
    shard: int = at_least(0, 0)  # processes that share one copy of the weights; 0: those of a node
    seed: int = 0
    save_every: int = at_least(1, 100)
    keep: int = at_least(1, 2)
    sample_every: int = at_least(1, 100)
    sample_prompts: tuple[str, ...] = ()
    sample_guidance: float = 5.0  # of the stages sampled with CFG


def parse(arguments: list[str]) -> Config:
    """A TOML file and key=value overrides -> Config. ValueError for what is wrong with them."""
    if not arguments:
        raise ValueError("usage: train.py CONFIG.toml [key=value ...]")
    return read(Config, arguments)


# ------------------------------------------------------------------------------------------- set-up


def build(cfg: Config, world: fsdp.World) -> Run:
    """Data, networks and optimizers. What is wrong, or too large, is found before loading."""
    data = Data(cfg)
    start = open_dit(cfg.weights) if cfg.weights else (PRESETS[cfg.preset], {})
    distilling = cfg.stage in DISTILLATIONS
    scores = start
    if distilling and cfg.teacher:
        scores = open_dit(cfg.teacher, channels=start[0].in_dim)
    check_fit(cfg, data, start[0], scores[0], world.rank)
    budget = expected(cfg, world, start[0], scores[0] if distilling else None)
    afford(cfg, world, budget, free(world))

    def optimizer(model: WanDiT, initial: dict, ema: bool) -> AdamW:
        storage = HostStorage(world.device, cfg.offload and world.device.type == "cuda")
        betas = (cfg.beta1, cfg.beta2)
        # The rate is set before every step.
        return AdamW(model, world, initial, 0.0, betas, cfg.weight_decay, ema=ema, storage=storage)

    generator, initial = network(cfg, world, cfg.weights, *start)
    optimizers = {"generator": optimizer(generator, initial, cfg.ema > 0)}
    if not distilling:
        return Run(cfg, world, data, budget, generator, optimizers)

    scored = cfg.teacher or cfg.weights
    teacher, _ = network(cfg, world, scored, *scores)
    teacher.requires_grad_(False)
    critic, initial = network(cfg, world, scored, *scores)
    optimizers["critic"] = optimizer(critic, initial, False)
    tokens = generator.cfg.tokens_per_frame(cfg.height, cfg.width)
    sizes = (cfg.micro_batch, cfg.frames, tokens, cfg.window or None)
    dtype = getattr(torch, cfg.dtype)
    cache = KVCache(generator.cfg, *sizes, device=world.device, dtype=dtype)
    run = Run(cfg, world, data, budget, generator, optimizers, critic, teacher, cache)
    if cfg.fp8:
        without_grad_in_fp8(run)
    return run


def network(
    cfg: Config, world: fsdp.World, path: str, sizes: DiTConfig, tensors: dict
) -> tuple[WanDiT, dict]:
    """A sharded network in the compute dtype, and what it was filled from: if nothing, random."""
    if not tensors:
        tensors = WanDiT(sizes).init_weights(rng("cpu", cfg.seed, "init")).state_dict()
    with torch.device("meta"):
        model = WanDiT(sizes).to(getattr(torch, cfg.dtype))
    model = world.shard(model)
    fill(model, tensors, fsdp.copy_part, path)
    model.checkpointing = cfg.checkpointing
    arrange(model, cfg.keep_attention, cfg.split_attention)
    return model, tensors


def facts(cfg: Config, sizes: DiTConfig, step: int, data: dict[str, str]) -> dict:
    """What a checkpoint or export says of itself; sample.py goes by it."""
    return {
        "stage": cfg.stage,
        "step": step,
        "levels": cfg.levels,
        "shift": cfg.shift,
        "chunk": cfg.chunk,
        "prefix": cfg.prefix or None,
        "window": cfg.window or None,
        "config": asdict(sizes),
        "training": asdict(cfg),
        "data": data,
    }


# --------------------------------------------------------------------------------------------- loop


def main(cfg: Config, world: fsdp.World) -> None:
    check_config(cfg, world)
    out = Path(cfg.out)
    with log.locked(out) if world.rank == 0 else contextlib.nullcontext():
        # Whether this run has been begun, or is finished.
        data = held_by(cfg)
        final = out / f"{cfg.stage}.safetensors"
        if final.exists():
            check_finished(cfg, data, final)
            print(f"{final} is there: this run is finished")
            return
        saved = fsdp.checkpoints(out)
        if saved:
            check_unchanged(cfg, data, saved[-1])
        run = train(cfg, world, data, saved[-1] if saved else None)
        if run is not None:
            export(run, final, data)


def train(cfg: Config, world: fsdp.World, data: dict, saved: Path | None) -> Run | None:
    """All steps behind a checkpoint, if there is one. None if SIGTERM has stopped it."""
    out = Path(cfg.out)
    leading = world.rank == 0

    # Every process opens the VAE, needed or not: what is wrong with it ends all of them.
    vae = None
    if cfg.vae:
        vae = load_vae(cfg.vae, world.device if leading else "meta", getattr(torch, cfg.dtype))
    fuse.enable(cfg.compile)
    run = build(cfg, world)
    flop = FlopCount()
    for model in filter(None, (run.generator, run.critic, run.teacher)):
        flop.watch(model)
    start = fsdp.load(world, saved, run.optimizers)["step"] if saved else 0
    if leading:
        log.begin(out, asdict(cfg), world.size, start)
    ceiling = matmul_rate(world.device, run.dtype)
    tokens = cfg.batch * cfg.frames * run.generator.cfg.tokens_per_frame(cfg.height, cfg.width)

    def checkpoint(done: int) -> None:
        fsdp.save(world, out, run.optimizers, facts(cfg, run.generator.cfg, done, data), cfg.keep)
        if leading:
            log.curves([out])

    steps = range(start, cfg.steps)
    bar = tqdm(steps, initial=start, total=cfg.steps, disable=not leading, desc=cfg.stage)
    for step in bar:
        # ------------------------------------------------------------------------------- one step
        began = time.perf_counter()
        flop_before = flop.done
        try:
            values = iteration(run, step)
        except InterruptedError:
            if step > start and step % cfg.save_every:  # otherwise this step's checkpoint is there
                checkpoint(step)
            tqdm.write(f"stopped by SIGTERM in step {step}, which the same command begins anew")
            return None
        metrics = world.mean(values)
        log.check_finite(values, metrics, step, world.rank, out)

        # Tokens are those of one global batch, though a distillation's step runs two; mfu counts
        # all FLOP that are done, recomputed ones too.
        done = step + 1
        seconds = time.perf_counter() - began
        metrics["step"] = step
        metrics["seconds"] = seconds
        metrics["gib"] = memory_gib(world.device)
        metrics["tokens_per_second"] = tokens / seconds
        metrics["mfu"] = (flop.done - flop_before) / seconds / ceiling
        if leading:
            log.append(out, metrics)
            bar.set_postfix({key: f"{metrics[key]:.3g}" for key in SHOWN if key in metrics})
        # ----------------------------------------------------------------------------------------

        if cfg.sample_prompts and done % cfg.sample_every == 0 and not world.stops():
            sample_videos(run, vae, out / "samples", done)
        if done % cfg.save_every == 0 or done == cfg.steps:
            checkpoint(done)

    if leading:
        needed = sum(run.budget["device"].values()) / GIB
        peak = memory_gib(world.device)
        print(f"peak memory: {peak:.2f} GiB (on a CPU the process's), expected {needed:.2f}")
    return run


def export(run: Run, final: Path, data: dict[str, str]) -> None:
    """The generator's average, if kept, else its masters, as one file; all processes take part."""
    result = run.optimizers["generator"].result
    if run.world.rank == 0:
        said = facts(run.cfg, run.generator.cfg, run.cfg.steps, data)
        save_dit(run.generator, final, said, value=result)
        return
    for name in run.generator.state_dict():
        result(name)


def run() -> None:
    cfg = parse(sys.argv[1:])
    with contextlib.closing(fsdp.World(cfg.device, cfg.shard)) as world:
        main(cfg, world)


if __name__ == "__main__":
    script(run)

"""Train one stage: teacher, ar, ode, dmd or sid.

    python train.py configs/dmd-5b.toml                                    # one process
    torchrun --nproc_per_node=8 train.py configs/dmd-5b.toml batch=64      # a node; overrides
    torchrun --nnodes=2 --nproc_per_node=8 ... train.py configs/dmd-5b.toml  # sharded in each node

The same command again goes on from the newest checkpoint. Nothing random depends on the number of
processes: every draw comes from (seed, phase, step, sample).

What a key is stands beside it: in Config of this file; LoRA's in wan5b/extras/adapters.py, those of
the GAN branch and Data-Forcing in wan5b/extras/phases.py.
"""

if __name__ == "__main__":
    from wan5b.extras import signals

    signals.while_loading()

import contextlib
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from wan5b import fsdp
from wan5b.data import Data
from wan5b.dit import PRESETS, DiTConfig, WanDiT
from wan5b.extras import adapters, checkpoints, compiler, gan, graphs, log, phases
from wan5b.extras.budget import Meter, afford, expected, free, peak
from wan5b.extras.checks import (
    check_alike,
    check_config,
    check_finished,
    check_fit,
    held_by,
    newest,
)
from wan5b.extras.cli import DEVICES, script
from wan5b.extras.config import at_least, described, one_of, path, read, within
from wan5b.extras.disk import check_run
from wan5b.extras.formats import open_dit
from wan5b.extras.merging import merge_rollouts
from wan5b.extras.offload import HostStorage
from wan5b.extras.previews import open_vae, sample_videos
from wan5b.extras.recipes import facts, frame_rate
from wan5b.extras.rollouts import new_cache, rollouts
from wan5b.extras.training_attention import arrange
from wan5b.flow import FEW_STEPS
from wan5b.optim import AdamW
from wan5b.runs import Run
from wan5b.stages import DISTILLATIONS, STAGES, iteration
from wan5b.t5 import NEGATIVE_PROMPT
from wan5b.util import rng
from wan5b.weights import fill, save_dit


@dataclass(frozen=True)
class Config(phases.MethodOptions, adapters.LoraOptions):
    """One run. Paths are of folders made by prepare.py, of a release, or of an export.

    The keys of LoRA stand in extras/adapters.py, those of the GAN branch and of Data-Forcing in
    extras/phases.py.
    """

    stage: str = one_of(STAGES, "")
    out: str = path()
    text: str = path()  # embeddings of all prompts
    weights: str = path()  # where the trained network starts; empty: random weights of `preset`
    preset: str = one_of(PRESETS, "tiny")
    teacher: str = path()  # dmd, sid: the frozen network; the critic starts from it too
    latents: str = path()  # teacher, ar; dmd, sid: where given, for prompts and real clips
    trajectories: str = path()  # ode
    vae: str = path()  # for sample videos, and rollout_frames
    negative: str = NEGATIVE_PROMPT

    frames: int = at_least(1, 21)  # latent frames
    height: int = at_least(1, 44)  # of latents
    width: int = at_least(1, 80)
    chunk: int = at_least(1, 3)  # latent frames generated together
    prefix: int = one_of((0, 1), 0)  # 1: image to video, a clean first frame outside the loss
    window: int = at_least(0, 0)  # latent frames that a chunk sees, itself included; 0: all
    sink: int = at_least(0, 0)  # dmd, sid: first ones that stay in the window
    sink_rope: str = one_of(("absolute", "relative"), "absolute")  # as in KVCache
    levels: tuple[int, ...] = FEW_STEPS  # of the few-step model, in thousandths before the shift
    levels_after: tuple[int, ...] = ()  # of chunks behind the first, if they have others
    clean_pass: bool = True  # False: the last level's keys are a chunk's context
    shift: float = at_least(1e-6, 5.0)

    steps: int = at_least(1, 1000)  # dmd, sid: each moves the critic, every ratio-th the generator
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
    ema_start: int = 200  # the iteration with which averaging starts

    ratio: int = at_least(1, 5)  # critic updates per generator update
    # DMD convention: cond + g (cond - uncond), one less than the sampling convention's scale.
    guidance: float = 3.0
    alpha: float = 1.0  # sid
    dropout: float = within(0, 1, 0.1)  # teacher, ar: share of samples with the negative prompt
    bell: bool = True  # teacher, ar: weight the flow loss over levels
    forcing: str = one_of(("teacher", "diffusion"), "teacher")  # ar, ode: on clean, on noisy chunks
    # dmd, sid: "self", or "data": each chunk behind real frames (the paper's baseline)
    rollout: str = one_of(("self", "data"), "self")
    # dmd, sid: up to so many latent frames are rolled out, the last `frames` of them scored
    rollout_frames: int = at_least(0, 0)

    device: str = one_of(DEVICES[:2], DEVICES[0])
    dtype: str = one_of(
        ("bfloat16", "float32"), "bfloat16" if torch.cuda.is_available() else "float32"
    )
    checkpointing: bool = True
    keep_attention: bool = False  # checkpointing keeps its results: 2 D bytes a token and layer
    split_attention: bool = False  # ar, ode: chunk by chunk, on a GPU faster than under a mask
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
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\n{described(Config)}")
        sys.exit()
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
    check_run(cfg, start[0], scores[0] if distilling else None)

    def optimizer(model: WanDiT, initial: dict, ema: bool) -> AdamW:
        storage = HostStorage(world.device, cfg.offload and world.device.type == "cuda")
        betas = (cfg.beta1, cfg.beta2)
        # The rate is set before every step.
        return AdamW(model, world, initial, 0.0, betas, cfg.weight_decay, ema=ema, storage=storage)

    # As `network` makes them, or with lora over one base.
    make = adapters.maker(network, cfg, world, start)
    generator, initial = make("generator", cfg.weights, *start)
    if cfg.lora and cfg.lora_merge:
        merge_rollouts(world, generator)
    optimizers = {"generator": optimizer(generator, initial, cfg.ema > 0)}
    own = {"phases": phases.of(cfg), "rollouts": rollouts(cfg, world), "fps": frame_rate(cfg)}
    if not distilling:
        return Run(cfg, world, data, budget, generator, optimizers, **own)

    scored = cfg.teacher or cfg.weights
    teacher, _ = make("teacher", scored, *scores)
    critic, initial = make("critic", scored, *scores)
    optimizers["critic"] = optimizer(critic, initial | gan.attach(cfg, world, critic), False)
    own |= {"critic": critic, "teacher": teacher, "cache": new_cache(cfg, generator.cfg, world)}
    return Run(cfg, world, data, budget, generator, optimizers, **own)


def network(
    cfg: Config,
    world: fsdp.World,
    who: str,
    path: str,
    sizes: DiTConfig,
    tensors: dict,
) -> tuple[WanDiT, dict]:
    """A sharded network in the compute dtype, and what it was filled from: if nothing, random.

    who: "generator" and "critic" are trained, "teacher" and "base" are not.
    """
    trained = who in ("generator", "critic")
    if not tensors:
        tensors = WanDiT(sizes).init_weights(rng("cpu", cfg.seed, "init")).state_dict()
    with torch.device("meta"):
        model = WanDiT(sizes).to(getattr(torch, cfg.dtype))
    model = world.shard(model.requires_grad_(trained)).to_empty(device=world.device)
    fill(model, tensors, fsdp.copy_part, path)
    model.checkpointing = cfg.checkpointing
    graphs.record_rollouts(cfg, world, who, model)
    arrange(model, cfg.keep_attention, cfg.split_attention)
    return model, tensors


# --------------------------------------------------------------------------------------------- loop


def main(cfg: Config, world: fsdp.World) -> None:
    check_config(cfg, world)
    out = Path(cfg.out)
    with log.locked(out) if world.rank == 0 else contextlib.nullcontext():
        data = held_by(cfg)
        check_alike(cfg, data, world)
        # Whether this run is finished, or has been begun: process 0 says, to which new files show
        # first.
        final = out / f"{cfg.stage}.safetensors"
        if world.exchange(final.exists())[0]:
            check_finished(cfg, data, final)
            if world.rank == 0:
                print(f"{final} is there: this run is finished")
            return
        run = train(cfg, world, data, newest(cfg, data, world))
        if run is not None:
            export(run, final, data)


def train(cfg: Config, world: fsdp.World, data: dict, saved: Path | None) -> Run | None:
    """All steps behind a checkpoint, if there is one. None if SIGTERM has stopped it."""
    out = Path(cfg.out)
    leading = world.rank == 0

    vae = open_vae(cfg, world)
    compiler.enable(cfg.compile)
    run = build(cfg, world)
    start = checkpoints.load(world, saved, run.optimizers)["step"] if saved else 0
    if leading:
        log.begin(out, asdict(cfg), world.size, start)
    meter = Meter(run)

    def checkpoint(done: int) -> None:
        said = facts(cfg, run.generator.cfg, done, data, run.fps)
        checkpoints.save(world, out, run.optimizers, said, cfg.keep)
        if leading:
            log.curves([out])

    steps = range(start, cfg.steps)
    bar = tqdm(steps, initial=start, total=cfg.steps, disable=not leading, desc=cfg.stage)
    for step in bar:
        # ------------------------------------------------------------------------------- one step
        meter.begin()
        try:
            values = iteration(run, step)
        except InterruptedError:
            if step > start and step % cfg.save_every:  # otherwise this step's checkpoint is there
                checkpoint(step)
            if leading:
                tqdm.write(f"stopped by SIGTERM in step {step}, which the same command begins anew")
            return None
        metrics = world.mean(values)
        log.check_finite(values, metrics, step, world.rank, out)

        metrics |= {"step": step, **meter.read()}
        if leading:
            log.append(out, metrics)
            bar.set_postfix(log.shown(metrics))
        # ----------------------------------------------------------------------------------------

        done = step + 1
        if cfg.sample_prompts and done % cfg.sample_every == 0 and not world.stops():
            sample_videos(run, vae, out / "samples", done)
        if done % cfg.save_every == 0 or done == cfg.steps:
            checkpoint(done)

    if leading:
        print(peak(run))
    return run


def export(run: Run, final: Path, data: dict[str, str]) -> None:
    """The generator's average, if kept, else its masters, as one file; all processes take part."""
    said = facts(run.cfg, run.generator.cfg, run.cfg.steps, data, run.fps)
    model, result = adapters.merged(run, final, said)
    if run.world.rank == 0:
        save_dit(model, final, said, value=result)
        return
    for name in model.state_dict():
        result(name)


def run() -> None:
    cfg = parse(sys.argv[1:])
    with contextlib.closing(fsdp.World(cfg.device, cfg.shard)) as world:
        main(cfg, world)


if __name__ == "__main__":
    script(run)

"""Train one stage: teacher, ar, ode, dmd or sid.

    python train.py configs/dmd-5b.toml                                    # one process
    torchrun --nproc_per_node=8 train.py configs/dmd-5b.toml batch=64      # one node; key=value overrides the file
    torchrun --nnodes=2 --nproc_per_node=8 ... train.py configs/dmd-5b.toml  # sharded in a node, replicated over nodes

The same command again goes on from the newest checkpoint. Nothing random depends on the number of processes: every draw
comes from (seed, step, sample).
"""

import contextlib
import json
import math
import resource
import subprocess
import sys
import time
import tomllib
import typing
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch.utils.benchmark import Timer
from tqdm import tqdm

from sample import DEVICES, MODES, generate, write
from wan5b import fsdp, fuse
from wan5b.data import rng
from wan5b.dit import PRESETS, DiTConfig
from wan5b.extras.curves import curves
from wan5b.flow import FEW_STEPS, sampling_sigmas
from wan5b.media import script
from wan5b.stages import GIB, STAGES, Run
from wan5b.t5 import NEGATIVE_PROMPT
from wan5b.weights import load_vae, read_metadata, save_dit

CHOICES = {"stage": " ".join(STAGES), "preset": " ".join(PRESETS), "forcing": "teacher diffusion"}
CHOICES |= {
    "rollout": "self data",
    "prefix": "0 1",
    "dtype": "bfloat16 float32",
    "device": " ".join(DEVICES[:2]),
}
RANGES = {
    (
        1,
        math.inf,
    ): "frames height width chunk steps batch micro_batch ratio save_every keep sample_every"
}
RANGES |= {
    (0, math.inf): "window warmup shard lr critic_lr weight_decay",
    (0, 1): "beta1 beta2 ema dropout",
}
RANGES |= {(1e-6, math.inf): "clip shift"}
# In the progress line; metrics.jsonl has everything.
SHOWN = ("loss", "norm", "critic_loss", "critic_norm", "seconds", "tokens_per_second", "mfu", "gib")


@dataclass(frozen=True)
class Config:
    """One run. Paths are of folders made by prepare.py, of a release, or of an export."""

    stage: str = ""
    out: str = ""
    text: str = ""  # embeddings of all prompts
    weights: str = ""  # where the trained network starts; empty: random weights of `preset`
    preset: str = "tiny"
    teacher: str = ""  # dmd, sid: the frozen network; the critic starts from it too
    latents: str = ""  # teacher, ar; dmd and sid with first = 1
    trajectories: str = ""  # ode
    vae: str = ""  # for sample videos
    negative: str = NEGATIVE_PROMPT
    frames: int = 21  # latent frames
    height: int = 44  # of latents
    width: int = 80
    chunk: int = 3
    prefix: int = 0  # 1: image to video, a clean first frame outside the loss
    window: int = 0
    levels: tuple[int, ...] = FEW_STEPS
    shift: float = 5.0
    steps: int = 1000
    batch: int = 64  # over all processes
    micro_batch: int = 1
    lr: float = 2e-6
    critic_lr: float = 4e-7
    warmup: int = 0
    decay: bool = False  # cosine, to zero at the last step
    beta1: float = 0.0
    beta2: float = 0.999
    weight_decay: float = 0.01
    clip: float = 10.0
    ema: float = 0.99  # 0: none
    ema_start: int = 200
    ratio: int = 5  # critic updates per generator update
    guidance: float = 3.0  # DMD convention: cond + g (cond - uncond), one less than the sampling convention's scale
    alpha: float = 1.0  # sid
    dropout: float = 0.1  # teacher, ar: share of samples whose text becomes the negative prompt
    bell: bool = True  # teacher, ar: weight the flow loss over levels
    forcing: str = "teacher"  # ar, ode: "teacher" (clean context) or "diffusion" (noisy context)
    rollout: str = "self"  # dmd: "self" rollouts, or "data": one chunk behind real frames (the paper's baseline)
    device: str = DEVICES[0]
    dtype: str = "bfloat16" if torch.cuda.is_available() else "float32"
    checkpointing: bool = True
    compile: bool = False  # dmd, sid: what runs without grad is compiled: a minute, then a tenth off a step (one GPU)
    offload: bool = False  # the optimizers' state in host memory: 60 GB of a 5B's dmd leave the GPU
    shard: int = 0  # processes that share one copy of the weights; 0: those of a node
    seed: int = 0
    save_every: int = 100
    keep: int = 2
    sample_every: int = 100
    sample_prompts: tuple[str, ...] = ()
    sample_guidance: float = 5.0  # of the stages sampled with CFG

    def __post_init__(self):
        for key, known in CHOICES.items():
            if str(getattr(self, key)) not in known.split():
                raise ValueError(f"{key} must be one of {known}, got {getattr(self, key)!r}")
        for (low, high), keys in RANGES.items():
            for key in keys.split():
                if not low <= getattr(self, key) < high:  # NaN is not, either
                    raise ValueError(
                        f"{key} must be at least {low} and below {high}, got {getattr(self, key)}"
                    )


def parse(arguments: list[str]) -> Config:
    """A TOML file and key=value overrides -> Config. ValueError for unknown keys and wrong types."""
    if not arguments:
        raise ValueError("usage: train.py CONFIG.toml [key=value ...]")
    try:
        values = tomllib.loads(Path(arguments[0]).read_text(encoding="utf-8"))
        for override in arguments[1:]:
            key, given, value = override.partition("=")
            if not given:
                raise ValueError(f"overrides are key=value, got {override!r}")
            values |= (
                {key: value}
                if Config.__annotations__.get(key, str) is str
                else tomllib.loads(f"{key} = {value}")
            )
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"cannot read {' '.join(arguments)}: {error}") from error
    kinds = {field.name: field.type for field in fields(Config)}
    if unknown := values.keys() - kinds.keys():
        raise ValueError(f"unknown keys {sorted(unknown)}; known: {list(kinds)}")
    for name, value in values.items():
        kind, *many = typing.get_args(kinds[name]) or (kinds[name],)
        items = value if many and isinstance(value, list) else [value]
        items = [float(item) if kind is float and type(item) is int else item for item in items]
        if bool(many) != isinstance(value, list) or any(type(item) is not kind for item in items):
            raise ValueError(
                f"{name} must be {'a list of ' if many else ''}{kind.__name__}, got {value!r}"
            )
        values[name] = tuple(items) if many else items[0]
    return Config(**values)


def check(cfg: Config, world: fsdp.World) -> None:
    """What can be known to be wrong before anything is loaded."""
    learns_from = {"ode": "trajectories", "dmd": "teacher", "sid": "teacher"}.get(
        cfg.stage, "latents"
    )
    for needed in ("out", "text", learns_from):
        if not getattr(cfg, needed):
            raise ValueError(f"stage {cfg.stage} needs {needed}: the config lacks it")
    if cfg.sample_prompts and not cfg.vae:
        raise ValueError("sample_prompts need the release of their VAE: name vae")
    if (cfg.prefix or cfg.rollout == "data") and cfg.stage in ("dmd", "sid") and not cfg.latents:
        raise ValueError(
            "prefix = 1 and rollout = 'data' take frames from real clips: name latents"
        )
    if cfg.window and cfg.window < cfg.chunk:
        raise ValueError(f"a chunk of {cfg.chunk} frames does not fit in a window of {cfg.window}")
    if (part := len(world.share(cfg.batch))) % cfg.micro_batch:
        given = f"batch {cfg.batch} is {part} a process, not a multiple of micro_batch {cfg.micro_batch}"
        raise ValueError(f"{given}; micro_batch={math.gcd(part, cfg.micro_batch)} would do")


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product on this device: what MFU is measured by."""
    n = 8192 if device.type == "cuda" else 768
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / Timer("a @ b", globals={"a": a, "b": b}).timeit(10).mean


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: of the GPU, or of the process."""
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else process


def facts(cfg: Config, network: DiTConfig, step: int) -> dict:
    """What a checkpoint or export says of itself; sample.py reads levels, shift and chunk layout."""
    layout = {
        "levels": cfg.levels,
        "shift": cfg.shift,
        "chunk": cfg.chunk,
        "prefix": cfg.prefix or None,
    }
    return {
        "stage": cfg.stage,
        "step": step,
        **layout,
        "config": asdict(network),
        "training": asdict(cfg),
    }


@torch.no_grad()
def sample_videos(run: Run, vae, folder: Path, step: int) -> None:
    """A clip of each sample prompt, always from the same noise, as this stage's network generates them.

    Image to video starts from the first frames of the data's first clips, whatever the prompts.
    """
    cfg = run.cfg
    mode = MODES[{"teacher": "bidirectional", "ar": "many"}.get(cfg.stage, "few")]
    sigmas = run.sigmas
    how = {"causal": mode.causal, "solver": mode.solver, "window": cfg.window or None}
    if mode.guided:
        sigmas = sampling_sigmas(24, cfg.shift)
        how |= {"solver": "euler", "guidance": cfg.sample_guidance}
    with run.optimizers["generator"].averaged(), run.world.gathered(run.generator):
        for i, prompt in enumerate(cfg.sample_prompts):
            noise = torch.randn(
                (1, *run.shape(sum(run.chunks))), generator=rng("cpu", cfg.seed, "sample", i)
            )
            first = run.clips([i % len(run.store)])[:, :, : cfg.prefix] if cfg.prefix else None
            context = run.context([prompt, cfg.negative] if mode.guided else [prompt])
            how |= {"prefix": first, "seed": cfg.seed}
            pieces = list(generate(run.generator, noise, context, sigmas, run.chunks, **how))
            if run.world.rank == 0:
                write(vae, pieces, folder / f"step-{step:07d}-{i}.mp4")


def check_unchanged(cfg: Config, checkpoint: Path) -> None:
    """ValueError if the checkpoint is of a run with other settings, but for those that training does not depend on."""
    saved = read_metadata(checkpoint).get("training", {})
    now = json.loads(json.dumps(asdict(cfg)))
    free = {
        "out",
        "device",
        "micro_batch",
        "shard",
        "checkpointing",
        "compile",
        "offload",
        "save_every",
    }
    free |= {"keep", "vae", "sample_every", "sample_prompts", "sample_guidance"}
    free |= set() if cfg.decay else {"steps"}  # the decay's length
    if changed := [
        key for key, value in now.items() if saved.get(key) != value and key not in free
    ]:
        raise ValueError(
            f"{checkpoint} was made with another {', '.join(changed)}; choose another out"
        )


def main(cfg: Config, world: fsdp.World) -> None:
    check(cfg, world)
    out, leading = Path(cfg.out), world.rank == 0
    final = out / f"{cfg.stage}.safetensors"
    if final.exists():
        raise ValueError(f"{final} exists, so this run is finished; choose another out")
    if saved := fsdp.checkpoints(out):
        check_unchanged(cfg, saved[-1])
    # a process that needs none opens it too: what is wrong with it ends all of them
    vae = (
        load_vae(cfg.vae, world.device if leading else "meta", getattr(torch, cfg.dtype))
        if cfg.vae
        else None
    )
    fuse.enable(cfg.compile, graphs=False)
    run = Run(cfg, world)
    start = fsdp.load(world, saved[-1], run.optimizers)["step"] if saved else 0
    log = out / "metrics.jsonl"
    if leading:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        git = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
        )
        record = {"commit": git.stdout.strip(), "processes": world.size, "config": asdict(cfg)}
        (out / "config.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        lines = log.read_text().splitlines() if log.exists() else []
        log.write_text("".join(f"{line}\n" for line in lines[:start]))  # one a step
    ceiling = matmul_rate(world.device, run.dtype)
    tokens = (
        cfg.batch * cfg.frames * run.generator.cfg.tokens_per_frame(cfg.height, cfg.width)
    )  # of latents

    def checkpoint(done: int) -> None:
        fsdp.save(world, out, run.optimizers, facts(cfg, run.generator.cfg, done), cfg.keep)
        if leading:
            curves([out])

    bar = tqdm(
        range(start, cfg.steps), initial=start, total=cfg.steps, disable=not leading, desc=cfg.stage
    )
    for step in bar:
        began, flop = time.perf_counter(), run.flop
        try:
            values = run.iteration(step)
        except InterruptedError:
            if step > start and step % cfg.save_every:  # else it is there
                checkpoint(step)
            tqdm.write(f"stopped by SIGTERM in step {step}, which the same command begins anew")
            return
        metrics = world.mean(values)
        if not torch.tensor(list(metrics.values())).isfinite().all():
            here = [
                name for name in values if not values[name].isfinite()
            ]  # norms are the same on all ranks
            where = (
                f"step {step}, rank {world.rank}: not finite here: {', '.join(here) or 'nothing'}"
            )
            last = (fsdp.checkpoints(out) or ["none"])[-1]
            raise FloatingPointError(
                f"{where}; means over ranks: {metrics}; last checkpoint: {last}"
            )

        seconds, done = time.perf_counter() - began, step + 1
        metrics |= {"step": step, "seconds": seconds, "gib": memory_gib(world.device)}
        # of one global batch, whatever its phases; recomputation is work
        metrics |= {
            "tokens_per_second": tokens / seconds,
            "mfu": (run.flop - flop) / seconds / ceiling,
        }
        if leading:
            with log.open("a") as file:
                file.write(json.dumps(metrics) + "\n")
            bar.set_postfix({k: f"{metrics[k]:.3g}" for k in SHOWN if k in metrics})
        if cfg.sample_prompts and done % cfg.sample_every == 0 and not world.stops():
            sample_videos(run, vae, out / "samples", done)
        if done % cfg.save_every == 0 or done == cfg.steps:
            checkpoint(done)

    result = run.optimizers["generator"].result  # every process takes part in gathering a weight
    if leading:
        save_dit(run.generator, final, facts(cfg, run.generator.cfg, cfg.steps), value=result)
        expected = sum(run.budget["device"].values()) / GIB
        print(
            f"peak memory: {memory_gib(world.device):.2f} GiB (on a CPU the process's), expected {expected:.2f}"
        )
    else:
        for name in run.generator.state_dict():
            result(name)


def run() -> None:
    cfg = parse(sys.argv[1:])
    with contextlib.closing(fsdp.World(cfg.device, cfg.shard)) as world:
        main(cfg, world)


if __name__ == "__main__":
    script(run)

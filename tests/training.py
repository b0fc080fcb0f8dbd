"""What the tests of training share: small data, configs and runs; what a run has left; distances.

Everything is smaller than the preset tiny, so that a run of four steps takes half a second.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from common import rel
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import train
from wan5b import attention, fsdp, stages
from wan5b.dit import DiTConfig, WanDiT
from wan5b.extras import budget
from wan5b.extras.budget import FlopCount
from wan5b.extras.shards import write_shard
from wan5b.flow import few_step_sigmas
from wan5b.weights import save_dit

ROOT = Path(__file__).parent.parent
STAGES = ("teacher", "ar", "ode", "dmd", "sid")
DIT = DiTConfig(32, 64, 2, 2, text_dim=16, text_len=8, freq_dim=16)
PROMPTS = [f"prompt {i}" for i in range(8)]
SIZES = (48, 6, 4, 4)  # channels, frames, height, width
TIMINGS = ("seconds", "tokens_per_second", "mfu", "gib")

PATHS = [str(ROOT), str(ROOT / "tests")]
if os.environ.get("PYTHONPATH"):
    PATHS.append(os.environ["PYTHONPATH"])
ENVIRONMENT = {"PYTHONPATH": ":".join(PATHS), "OMP_WAIT_POLICY": "passive"}

# ------------------------------------------------------------------------------------ what is given


def make_data(folder: Path) -> Path:
    """Stores of all kinds, and weights of a generator and a teacher."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=g)

    lengths = torch.tensor([3, 5] * 5)
    texts = {"rows": randn(40, DIT.text_dim).bfloat16(), "lengths": lengths}
    write_shard(folder / "text/00000.safetensors", texts, [*PROMPTS, "neg", ""], negative="neg")
    clips = {"latent": randn(8, *SIZES)}
    write_shard(folder / "latents/00000.safetensors", clips, PROMPTS)
    paths = {"x": randn(8, 5, *SIZES)}
    write_shard(folder / "ode/00000.safetensors", paths, PROMPTS, sigmas=few_step_sigmas())
    for seed, name in enumerate(("generator", "teacher")):
        model = WanDiT(DIT).init_weights(g.manual_seed(seed))
        save_dit(model, folder / f"{name}.safetensors", {})
    return folder


def values(data: Path, stage: str, out="unused", /, **changes) -> dict:
    """The keys of a small run: two micro-batches of two samples, four steps, a save in the middle.

    It names what its stage reads, and no more.
    """
    given = {
        "stage": stage,
        "out": str(out),
        "text": str(data / "text"),
        "weights": str(data / "generator.safetensors"),
        "negative": "neg",
        "frames": 6,
        "height": 4,
        "width": 4,
        "batch": 4,
        "micro_batch": 2,
        "steps": 4,
        "save_every": 2,
        "lr": 1e-4,
        "ema_start": 1,
        "device": "cpu",
        "dtype": "float32",
        "keep": 9,
    }
    real_frames = changes.get("prefix") or changes.get("rollout") == "data"
    real_clips = changes.get("gan_weight") or changes.get("data_forcing")
    if stage in ("teacher", "ar") or real_frames or real_clips:
        given["latents"] = str(data / "latents")
    if stage == "ode":
        given["trajectories"] = str(data / "ode")
    if stage in ("dmd", "sid"):
        given |= {"teacher": str(data / "teacher.safetensors"), "critic_lr": 1e-4, "ratio": 2}
    return given | changes


def config(data: Path, stage: str, out="unused", **changes) -> train.Config:
    return train.Config(**values(data, stage, out, **changes))


def write_toml(path: Path, keys: dict) -> Path:
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items()))
    return path


# ------------------------------------------------------------------------------------------ running


def make_run(data: Path, stage: str, **changes) -> stages.Run:
    return train.build(config(data, stage, **changes), fsdp.World("cpu"))


def first_batch(run: stages.Run, phase: str, step: int = 0) -> stages.Batch:
    """The first micro-batch of a phase: a new one each time, whose draws start anew."""
    return next(stages.micro_batches(run, phase, step, moved=False))


def run_phase(run: stages.Run, phase: stages.Phase, step: int = 0) -> list[dict[str, Tensor]]:
    """One phase of an iteration, but for the optimizer's step: so its gradients stay."""
    return [
        phase.step(run, batch) for batch in stages.micro_batches(run, phase.name, step, moved=False)
    ]


def gradients(run: stages.Run) -> dict[str, Tensor]:
    """Those of every phase, all micro-batches added up."""
    found = {}
    for phase in stages.PHASES[run.cfg.stage]:
        run_phase(run, phase)
        grads = run.optimizers[phase.moves].grads
        found |= {f"{phase.name}.{name}": grad for name, grad in grads.items()}
    return found


def watch(model: torch.nn.Module) -> list[tuple]:
    """A list that takes (arguments, options, result) of every forward to come."""
    calls = []

    def note(model, arguments, options, result):
        calls.append((arguments, options, result))

    model.register_forward_hook(note, with_kwargs=True)
    return calls


def finish(cfg: train.Config) -> dict[str, Tensor]:
    """Train to the end in this process; the exported tensors."""
    train.main(cfg, fsdp.World(cfg.device))
    return load_file(Path(cfg.out) / f"{cfg.stage}.safetensors")


def python(code: str, *arguments) -> subprocess.Popen:
    """A new process with as many threads as this one, so that sums come out alike."""
    command = [sys.executable]
    if code:
        command += ["-c", code]
    command += map(str, arguments)
    environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def refused(command, *arguments) -> str:
    """The one line that a refusal prints. command: the fixture."""
    code, lines = command(*arguments)
    assert code == 2, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("train.py: error: ")
    return lines[0]


# -------------------------------------------------------------------------------- what a run leaves


def names(out: Path) -> list[str]:
    """Of checkpoints, unfinished ones among them."""
    return sorted(path.name for path in out.glob("step-*"))


def checkpoint_state(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole."""
    state = {}
    for name, entry in dcp.FileSystemReader(path).read_metadata().state_dict_metadata.items():
        state[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


def read_metrics(out: Path, timings=False) -> list[dict]:
    """The metrics of every step; without timings, what should come out alike anywhere."""
    rows = []
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.append({key: row[key] for key in row if timings or key not in TIMINGS})
    return rows


def without_std(row: dict) -> dict:
    """The metrics that are means over samples."""
    return {key: value for key, value in row.items() if "std" not in key}


# ---------------------------------------------------------------------------------------- distances


def same(a: dict, b: dict) -> bool:
    """The same names and the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def furthest(a: dict, b: dict) -> float:
    """Largest relative error of a tensor."""
    assert a.keys() == b.keys()
    return max(rel(a[key], b[key]) for key in a if b[key].norm() > 0)


def apart(a: dict, b: dict, lr=1e-4) -> float:
    """Distance of weights, in units of one step of Adam, which is +-lr for every weight.

    Of all weights together: of a bias near 0, rounding decides the sign, so no tensor by itself can
    be compared.
    """
    assert a.keys() == b.keys()
    squares = sum((a[key] - b[key]).double().square().sum() for key in a)
    count = sum(value.numel() for value in a.values())
    return (squares / count).sqrt().item() / lr


# ----------------------------------------------------------------------------------------- counting


def flop_share(run: stages.Run, monkeypatch, **options) -> float:
    """FlopCount's of an iteration, in those that torch's counter finds, without the scores that
    attention's backward makes again: here attention is made of matrix products, which does not.
    options: of the counter.
    """
    flop = FlopCount()
    for model in filter(None, (run.generator, run.critic, run.teacher)):
        flop.watch(model)
    monkeypatch.setattr(attention, "_BACKENDS", [torch.nn.attention.SDPBackend.MATH])
    inner = budget.forward_flop
    extra = 0.0

    def spy(cfg, x, **given):
        nonlocal extra
        linear, scores = inner(cfg, x, **given)
        if torch.is_grad_enabled():
            extra += 0.5 * scores
        return linear, scores

    monkeypatch.setattr(budget, "forward_flop", spy)
    with FlopCounterMode(display=False, **options) as counter:
        stages.iteration(run, 0)
    return (flop.done - extra) / counter.get_total_flops()

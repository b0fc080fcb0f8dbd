"""The whole method on two CPU cores: teacher -> ar -> ode -> dmd, each stage sampled and scored.

    make demo        # about 14 minutes; ends with a table, out/demo/drift.png, sheet.png and curves

Afterwards the model is an ordinary release plus export:
    .venv/bin/python sample.py --release out/demo/release --weights out/demo/dmd/dmd.safetensors \\
        --prompt "a red ring moves left" --size 64x64 --frames 105 --sheet
"""

import argparse
import contextlib
import shutil
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from scorer import Target, beside, score, seen, summary
from torch import Tensor, nn
from world import LABELS, codec_basis, draw

# The repository: its scripts are imported, not installed.
sys.path.insert(0, str(Path(__file__).parents[2]))

from show import draw_drift, draw_sheet, table

import prepare
import train
from wan5b import fsdp
from wan5b.data import TextStore
from wan5b.dit import PRESETS, WanDiT
from wan5b.extras.cli import script
from wan5b.extras.codec import LinearCodec
from wan5b.extras.formats import load_dit, load_vae
from wan5b.extras.log import curves
from wan5b.extras.sampling import MODES, Mode, generate
from wan5b.extras.shards import write_shard
from wan5b.flow import few_step_sigmas, shift_sigma
from wan5b.t5 import T5Config, T5Encoder
from wan5b.util import write_json
from wan5b.weights import save_dit

HERE = Path(__file__).parent
TOKENIZER = HERE.parents[1] / "tests" / "golden" / "tokenizer" / "spiece.model"
TRAINED = 9  # latent frames of a training clip
CHUNK = 1
WINDOW = 5  # latent frames that a chunk sees, itself included
MEAN_SCALE = 0.35  # of the codec
SIDE = 4  # of a latent frame
PER_SHARD = 96  # clips
# What is sampled and judged: two directions of every colour and shape, in turn.
JUDGED = [label for i, label in enumerate(LABELS) if (i + i // 4) % 2 == 0]
SAMPLING_SEED = 1
LENGTHS = (1, 3, 10, 30)  # at which clips are judged, in lengths of a training clip
PART = 3  # latent frames that are judged together
SHOWN = (0, 9, 14, 23)  # of JUDGED, on the sheet: all colours, shapes and directions
# How each run is sampled: a name of extras/sampling.MODES.
SAMPLED = {
    "teacher": "bidirectional",
    "ar": "many",
    "ode": "few",
    "dmd-data": "few",
    "dmd": "few",
}

# ------------------------------------------------------------------------------------------ inputs


def make_release(folder: Path, mean_scale: float = 1.0) -> None:
    """What stands in for a release: codec for the VAE, a frozen random T5, the tokenizer.

    mean_scale: of the codec, see `codec_basis`.
    """
    tokenizer = folder / "google" / "umt5-xxl"
    tokenizer.mkdir(parents=True)
    shutil.copy(TOKENIZER, tokenizer)

    torch.manual_seed(0)
    encoder = T5Encoder(T5Config(dim=64, dim_attn=64, dim_ffn=128, num_heads=4, num_layers=2))
    torch.save(encoder.state_dict(), folder / "models_t5_tiny.pth")

    basis, dual = codec_basis(mean_scale=mean_scale)
    save_file({"basis": basis, "dual": dual}, folder / "codec_VAE.safetensors")


def make_data(out: Path, clips: int) -> None:
    """Embeddings of all captions (the ordinary way), latents of drawn clips."""
    captions = out / "captions.txt"
    captions.write_text("".join(f"{label}\n" for label in LABELS))
    options = ["--release", out / "release", "--prompts", captions, "--negative", ""]
    run_prepare("text", *options, "--out", out / "text")

    codec = load_vae(out / "release")
    for shard in range(clips // PER_SHARD):
        labels = [LABELS[i % len(LABELS)] for i in range(PER_SHARD)]
        latents = codec.encode(draw(labels, 4 * TRAINED - 3, seed=shard))
        path = out / "latents" / f"{shard:05}.safetensors"
        write_shard(path, {"latent": latents}, [str(label) for label in labels])


def make_trajectories(out: Path, seed: int, weights: Path, folder: Path, repeats: int = 6) -> None:
    """ODE trajectories of a causal model, so many for each caption."""
    options = ["--release", out / "release", "--weights", weights, "--causal"]
    options += ["--text", out / "text", "--size", "64x64", "--frames", 4 * TRAINED - 3]
    options += ["--guidance", 2, "--steps", 12, "--seed", seed, "--repeats", repeats]
    options += ["--batch", 48, "--per-shard", 48]
    run_prepare("trajectories", *options, "--out", folder)


def run_prepare(*arguments) -> None:
    """One run of prepare.py in this process."""
    prepare.main([str(argument) for argument in arguments])


def carrying(model: WanDiT) -> WanDiT:
    """Start as a network that carries its input through.

    Patches come in by an orthogonal matrix and go out by its transpose. A token holds 192 values of
    noise, and v asks for all of them back: without this, learning to carry them takes most of a
    short training (teacher after 1,000 steps: relative x0 error .69 at sigma .83, with it .24).
    """
    channels = model.cfg.in_dim
    dim = model.cfg.dim
    with torch.no_grad():
        model.init_weights(torch.Generator().manual_seed(0))
        inward = model.patch_embedding.weight  # [D, C, 1, 2, 2]
        nn.init.orthogonal_(inward.view(dim, -1), generator=torch.Generator().manual_seed(0))

        # The head's rows are in the order (row, column, channel) of a patch.
        outward = inward.flatten(1).unflatten(1, (channels, 4))  # [D, C, 4]
        outward = outward.permute(2, 1, 0).flatten(0, 1)  # [4 * C, D]
        model.head.head.weight.copy_(outward * (4 * channels / dim) ** 0.5)
        model.head.modulation.mul_(0.1)

        # Blocks begin by adding nothing.
        for block in model.blocks:
            block.self_attn.o.weight.zero_()
            block.cross_attn.o.weight.zero_()
            block.ffn[2].weight.zero_()
    return model


# ---------------------------------------------------------------------------------------- training


def export(out: Path, run: str) -> Path:
    """The weights that a run leaves: dmd-data/dmd.safetensors."""
    stage = run.split("-")[0]
    return out / run / f"{stage}.safetensors"


def config(out: Path, name: str, *overrides: str) -> train.Config:
    """Of one run of train.py."""
    stage = name.split("-")[0]
    common = [f"out={out / name}", f"text={out / 'text'}", f"vae={out / 'release'}"]
    return train.parse([str(HERE / f"{stage}.toml"), *common, *overrides])


def run_stage(out: Path, name: str, *overrides: str) -> float:
    """One run of train.py in this process; the seconds it took."""
    start = time.time()
    cfg = config(out, name, *overrides)
    with contextlib.closing(fsdp.World("cpu")) as world:
        train.main(cfg, world)
    return time.time() - start


def train_all(out: Path, seed: int, steps: int | None) -> dict[str, float]:
    """All stages, each from the one before; the seconds they took. steps, seed: see `demo`."""
    common = [f"seed={seed}"]
    if steps is not None:
        common.append(f"steps={steps}")
    latents = f"latents={out / 'latents'}"
    seconds = {}

    weights = f"weights={out / 'init.safetensors'}"
    seconds["teacher"] = run_stage(out, "teacher", weights, latents, *common)
    weights = f"weights={export(out, 'teacher')}"
    seconds["ar"] = run_stage(out, "ar", weights, latents, *common)

    start = time.time()
    make_trajectories(out, seed, export(out, "ar"), out / "trajectories")
    weights = f"weights={export(out, 'ar')}"
    run_stage(out, "ode", weights, f"trajectories={out / 'trajectories'}", *common)
    seconds["ode"] = time.time() - start

    # Self Forcing, and what it is compared with: each chunk behind real frames.
    weights = f"weights={export(out, 'ode')}"
    teacher = f"teacher={export(out, 'teacher')}"
    for name, rollout in (("dmd", "self"), ("dmd-data", "data")):
        options = [weights, teacher, latents, f"rollout={rollout}"]
        seconds[name] = run_stage(out, name, *options, *common)
    return seconds


# ------------------------------------------------------------------------------------------ scores


def levels(mode: Mode) -> list[float]:
    """Of few steps where the model is made for them, else of 12 Euler steps."""
    if mode.guided:
        return [shift_sigma(1 - i / 12) for i in range(12)] + [0.0]
    return few_step_sigmas()


@torch.no_grad()
def sample_clips(
    model: WanDiT, text: TextStore, mode: Mode, frames: int, seed: int, sigmas=None, **more
) -> Tensor:
    """Latents [24, C, frames, 4, 4], one clip for each of JUDGED.

    sigmas: other levels than the mode's. more: arguments of `generate`.
    """
    prompts = [str(label) for label in JUDGED]
    how = {"causal": mode.causal, "solver": "renoise", "seed": seed}
    if mode.guided:
        prompts += [""] * len(JUDGED)
        how["solver"] = "euler"
        how["guidance"] = 2.0
    context = text.batch(prompts, model.cfg.text_len)

    chunks = [frames]
    if mode.causal:
        chunks = [CHUNK] * (frames // CHUNK)
        how["window"] = WINDOW
    shape = (len(JUDGED), model.cfg.in_dim, frames, SIDE, SIDE)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    pieces = generate(model, noise, context, sigmas or levels(mode), chunks, **how, **more)
    return torch.cat(list(pieces), 2)


def parts(length: int) -> list[int]:
    """Which parts of a clip of so many training lengths are judged: all of the first three lengths,
    then one in four, and all of the length that ends at each of LENGTHS.
    """
    each = TRAINED // PART  # parts of a training length
    chosen = {*range(3 * each), *range(3 * each, LENGTHS[-1] * each, 4)}
    for whole in LENGTHS:
        chosen |= set(range((whole - 1) * each, whole * each))
    return sorted(part for part in chosen if part < length * each)


def decoded(latents: Tensor, codec: LinearCodec, start: int, end: int) -> Tensor:
    """The pixel frames of latent frames start .. end of clips."""
    if start == 0:
        return codec.decode(latents[:, :, :end])
    # The codec makes one frame, not four, of the first latent that it is given.
    return codec.decode(latents[:, :, start - 1 : end])[:, :, 1:]


def judge(latents: Tensor, codec: LinearCodec) -> dict[str, Tensor]:
    """The scores of every part that is judged, [B, parts] each."""
    chosen = parts(latents.shape[2] // TRAINED)
    return score((decoded(latents, codec, PART * i, PART * (i + 1)) for i in chosen), JUDGED)


def at_lengths(scores: dict[str, Tensor]) -> dict[int, dict]:
    """Length -> summary of the last training length there, as far as the clips go."""
    each = TRAINED // PART
    found = {}
    for length in LENGTHS:
        chosen = parts(length)
        if len(chosen) > scores["drift"].shape[1]:
            break
        places = [chosen.index(part) for part in range((length - 1) * each, length * each)]
        found[length] = summary(scores, places)
    return found


def score_all(out: Path, codec: LinearCodec, longest: int) -> tuple[dict, dict, dict[str, Tensor]]:
    """Of every run: scores for the report, curves over the length, latents of the SHOWN clips."""
    text = TextStore(out / "text")
    rows = {}
    lines = {}
    clips = {}
    for name in SAMPLED:
        mode = MODES[SAMPLED[name]]
        model = load_dit(export(out, name))
        # Only a causal model can make clips that are longer than those of its training.
        length = longest if mode.causal else 1
        start = time.time()
        latents = sample_clips(model, text, mode, TRAINED * length, SAMPLING_SEED)
        made = len(JUDGED) * (4 * TRAINED * length - 3)  # pixel frames
        cost = {
            "steps": len(levels(mode)) - 1,
            "ms_per_frame": 1000 * (time.time() - start) / made,
        }
        scores = judge(latents, codec)
        for at, found in at_lengths(scores).items():
            rows[f"{name} x{at}"] = found | cost
        if mode.causal:
            ends = [(part + 1) * PART / TRAINED for part in parts(length)]
            means = {key: value.mean(0).tolist() for key, value in scores.items()}
            lines[name] = {"lengths": ends} | means
        clips[name] = latents[list(SHOWN)]
    return rows, lines, clips


def another_clip() -> float:
    """The drift from one clip to another: what is left if nothing is remembered."""
    pictures = draw(LABELS * 2, 1, seed=12345)
    first, second = pictures.split(len(LABELS))
    target = Target.of(LABELS)
    gap = beside(seen(first), target) - beside(seen(second), target)
    return gap.square().mean((1, 2, 3)).sqrt().mean().item()


def sheet(path: Path, clips: dict[str, Tensor], codec: LinearCodec) -> None:
    """Frames of four clips of every run, at the same times."""
    ends = (1, PART, *(TRAINED * length for length in (1, 2, 3, 5, 10, 20, 30)))
    heads = [f"frame {4 * end - 3}" for end in ends]
    rows = []
    for name, latents in clips.items():
        there = [end for end in ends if end <= latents.shape[2]]
        frames = [decoded(latents, codec, end - 1, end)[:, :, -1] for end in there]
        pictures = torch.stack(frames, 2)  # [4, 3, n, 64, 64]
        for caption, row in zip(SHOWN, pictures, strict=True):
            rows.append((name, str(JUDGED[caption]), row))
    draw_sheet(path, rows, heads)


# -------------------------------------------------------------------------------------------- main


def demo(out: Path, clips: int, seed: int, steps: int | None, longest: int) -> None:
    """Make, train, sample and score everything.

    clips: of training, a multiple of PER_SHARD. seed: of the training. steps: of every stage, in
    place of the configs'. longest: up to which of LENGTHS clips are judged.
    """
    if clips < 1 or clips % PER_SHARD:
        raise ValueError(f"--clips {clips}: they are made {PER_SHARD} at a time, give a multiple")
    # Shards of latents that are left of more clips would be trained on.
    if any((out / name).exists() for name in ("release", "latents")):
        raise ValueError(f"{out} exists; delete it or choose another --out")
    began = time.time()
    make_release(out / "release", MEAN_SCALE)
    make_data(out, clips)
    save_dit(carrying(WanDiT(PRESETS["tiny"])), out / "init.safetensors", {})
    seconds = {"data": time.time() - began}
    seconds |= train_all(out, seed, steps)
    report(out, seconds, began, longest)


def report(out: Path, seconds: dict[str, float], began: float, longest: int) -> None:
    """Sample, score and show what was trained."""
    codec = load_vae(out / "release")
    rows, lines, clips = score_all(out, codec, longest)
    found = {"rows": rows, "curves": lines, "another": another_clip()}
    found |= {"seconds": seconds, "total": time.time() - began}
    write_json(out / "report.json", found)
    table([out])
    draw_drift(out / "drift.png", [out])
    sheet(out / "sheet.png", clips, codec)
    curves([out / name for name in ("dmd", "dmd-data", "ode", "ar", "teacher")])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/demo"))
    add("--seed", type=int, default=0, help="of the training")
    add("--threads", type=int, default=2, help="of torch (2)")
    add("--clips", type=int, default=1536, help=f"to train on, a multiple of {PER_SHARD} (1536)")
    add("--steps", type=int, help="of every stage, for a quick look")
    add(
        "--longest", type=int, choices=LENGTHS, default=LENGTHS[-1], help="up to where it is judged"
    )
    add("--table", nargs="+", type=Path, metavar="DIR", help="only print the table of these runs")
    add("--plot", type=Path, metavar="PNG", help="with --table: draw their drift into this file")
    args = parser.parse_args()
    if args.table:
        table(args.table)
        if args.plot:
            draw_drift(args.plot, args.table)
    else:
        torch.set_num_threads(args.threads)
        demo(args.out, args.clips, args.seed, args.steps, args.longest)


if __name__ == "__main__":
    script(main)

"""The whole method on two CPU cores, measured: teacher -> ar -> ode -> dmd, each stage sampled and scored.

    make demo            # about 13 minutes; ends with a table, out/demo/sheet.png and curves

Afterwards the model is an ordinary release plus export:
    .venv/bin/python sample.py --release out/demo/release --weights out/demo/dmd/dmd.safetensors \\
        --prompt "a red ring moves left" --size 64x64 --frames 105 --window 9 --sheet
"""

import argparse
import contextlib
import json
import shutil
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from world import LABELS, codec_basis, draw, pixel_chunks, score, summary

sys.path.insert(
    0, str(Path(__file__).parents[2])
)  # the repository: its scripts are imported, not installed

import prepare
import sample
import train
from wan5b import fsdp, media
from wan5b.data import TextStore, write_shard
from wan5b.dit import PRESETS, WanDiT
from wan5b.extras import files
from wan5b.extras.codec import LinearCodec
from wan5b.extras.formats import load_dit, load_vae
from wan5b.extras.log import curves
from wan5b.flow import few_step_sigmas, shift_sigma
from wan5b.t5 import T5Config, T5Encoder
from wan5b.weights import save_dit

HERE = Path(__file__).parent
TRAINED, LONG, CHUNK = 9, 27, 3  # latent frames of a training clip, of a sampled one, of a chunk
EULER = [shift_sigma(1 - i / 12) for i in range(12)] + [0.0]  # the many-step samplers': 12 steps
COLUMNS = ("colour", "shape", "direction", "area_change", "std_first", "std_last")
SAMPLED = {  # stage -> (mode, levels) it is sampled with
    "teacher": (sample.MODES["bidirectional"], EULER),
    "ar": (sample.MODES["many"], EULER),
    "ode": (sample.MODES["few"], few_step_sigmas()),
    "dmd": (sample.MODES["few"], few_step_sigmas()),
    "dmd-data": (sample.MODES["few"], few_step_sigmas()),
}


def make_release(folder: Path) -> None:
    """What stands in for a release: a codec in the VAE's place, a frozen random T5, the tokenizer."""
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    shutil.copy(
        HERE.parents[1] / "tests" / "golden" / "tokenizer" / "spiece.model",
        folder / "google" / "umt5-xxl",
    )
    torch.manual_seed(0)
    encoder = T5Encoder(T5Config(dim=64, dim_attn=64, dim_ffn=128, num_heads=4, num_layers=2))
    torch.save(encoder.state_dict(), folder / "models_t5_tiny.pth")
    basis, dual = codec_basis()
    save_file({"basis": basis, "dual": dual}, folder / "codec_VAE.safetensors")


def make_data(out: Path, clips: int) -> None:
    """Embeddings of all captions (the ordinary way), latents of drawn clips."""
    captions = out / "captions.txt"
    captions.write_text("".join(f"{label}\n" for label in LABELS))
    arguments = [
        "text",
        "--release",
        out / "release",
        "--prompts",
        captions,
        "--negative",
        "",
        "--out",
        out / "text",
    ]
    prepare.main([str(x) for x in arguments])
    codec = load_vae(out / "release")
    for shard in range(clips // 96):
        labels = [LABELS[i % len(LABELS)] for i in range(96)]
        latents = codec.encode(draw(labels, 4 * TRAINED - 3, seed=shard))
        write_shard(
            out / "latents" / f"{shard:05}.safetensors",
            {"latent": latents},
            [str(label) for label in labels],
        )


def carrying(model: WanDiT) -> WanDiT:
    """Start as a network that carries its input through: patches in by an orthogonal matrix, out by its transpose.

    A token holds 192 values of noise, and v asks for all of them back: without this, learning to carry them takes most
    of a short training (teacher after 1,000 steps: relative x0 error .69 at sigma .83, with it .24).
    """
    with torch.no_grad():
        model.init_weights(torch.Generator().manual_seed(0))
        inward, channels = model.patch_embedding.weight, model.cfg.in_dim
        nn.init.orthogonal_(
            inward.view(model.cfg.dim, -1), generator=torch.Generator().manual_seed(0)
        )
        outward = (
            inward.flatten(1).unflatten(1, (channels, 4)).permute(2, 1, 0).flatten(0, 1)
        )  # [(ph, pw, C), D]
        model.head.head.weight.copy_(outward * (4 * channels / model.cfg.dim) ** 0.5)
        model.head.modulation.mul_(0.1)
        for block in model.blocks:
            for layer in (block.self_attn.o, block.cross_attn.o, block.ffn[2]):
                layer.weight.zero_()
    return model


def run_stage(out: Path, name: str, config: str, *overrides: str) -> float:
    """One run of train.py in this process; the seconds it took."""
    start = time.time()
    common = [f"out={out / name}", f"text={out / 'text'}", f"vae={out / 'release'}"]
    cfg = train.parse([str(HERE / config), *common, *overrides])
    with contextlib.closing(fsdp.World("cpu")) as world:
        train.main(cfg, world)
    return time.time() - start


@torch.no_grad()
def sample_clips(
    model: WanDiT, text: TextStore, mode: sample.Mode, sigmas: list[float], frames: int, seed: int
) -> torch.Tensor:
    """Latents [48, C, frames, 4, 4], one clip a caption."""
    prompts = [str(label) for label in LABELS]
    negative = [""] * len(prompts)
    context = text.batch(prompts + negative if mode.guided else prompts, model.cfg.text_len)
    noise = torch.randn(
        len(prompts), model.cfg.in_dim, frames, 4, 4, generator=torch.Generator().manual_seed(seed)
    )
    chunks = [frames]
    how = {"causal": mode.causal, "solver": mode.solver, "seed": seed}
    if mode.guided:
        how |= {"guidance": 2.0, "solver": "euler"}
    if mode.causal:
        chunks = [CHUNK] * (frames // CHUNK)
        how["window"] = TRAINED
    return torch.cat(list(sample.generate(model, noise, context, sigmas, chunks, **how)), 2)


def judge(latents: torch.Tensor, codec: LinearCodec) -> dict[str, float]:
    """The scorer's summary, plus the latents' spread in the first and the last chunk."""
    chunks = [CHUNK] * (latents.shape[2] // CHUNK)
    found = summary(score(codec.decode(latents), LABELS, pixel_chunks(chunks)))
    return found | {
        "std_first": float(latents[:, :, :CHUNK].std()),
        "std_last": float(latents[:, :, -CHUNK:].std()),
    }


def main(args: argparse.Namespace) -> None:
    out, began, minutes = Path(args.out), time.time(), {}
    if (out / "release").exists():
        raise ValueError(f"{out} exists; delete it or choose another --out")
    torch.set_num_threads(args.threads)
    make_release(out / "release")
    make_data(out, args.clips)
    save_dit(carrying(WanDiT(PRESETS["tiny"])), out / "init.safetensors", {})
    minutes["data"] = time.time() - began

    def trained(name: str) -> str:
        stage = name.split("-")[0]
        return str(out / name / f"{stage}.safetensors")

    seed, latents = f"seed={args.seed}", f"latents={out / 'latents'}"
    steps = [] if args.steps is None else [f"steps={args.steps}"]
    start = f"weights={out / 'init.safetensors'}"
    minutes["teacher"] = run_stage(out, "teacher", "teacher.toml", start, latents, seed, *steps)
    minutes["ar"] = run_stage(
        out, "ar", "ar.toml", f"weights={trained('teacher')}", latents, seed, *steps
    )

    began_ode = time.time()
    arguments = [
        "trajectories",
        "--release",
        out / "release",
        "--weights",
        trained("ar"),
        "--text",
        out / "text",
    ]
    arguments += [
        "--out",
        out / "trajectories",
        "--size",
        "64x64",
        "--frames",
        4 * TRAINED - 3,
        "--causal",
    ]
    arguments += [
        "--guidance",
        2,
        "--steps",
        12,
        "--batch",
        48,
        "--per-shard",
        48,
        "--seed",
        args.seed,
    ]
    prepare.main([str(x) for x in [*arguments, "--repeats", 6]])
    paths = f"trajectories={out / 'trajectories'}"
    run_stage(out, "ode", "ode.toml", f"weights={trained('ar')}", paths, seed, *steps)
    minutes["ode"] = time.time() - began_ode
    for name, context in (("dmd", "self"), ("dmd-data", "data")):
        ends = [
            f"weights={trained('ode')}",
            f"teacher={trained('teacher')}",
            latents,
            seed,
            f"rollout={context}",
        ]
        minutes[name] = run_stage(out, name, "dmd.toml", *ends, *steps)

    text, codec, rows, clips = TextStore(out / "text"), load_vae(out / "release"), {}, {}
    for name, (mode, sigmas) in SAMPLED.items():
        model = load_dit(trained(name))
        lengths = [TRAINED, LONG] if mode.causal else [TRAINED]
        for frames in lengths:
            start = time.time()
            seeds = [sample_clips(model, text, mode, sigmas, frames, seed) for seed in (1, 2, 3)]
            cost = {
                "steps": len(sigmas) - 1,
                "ms_per_frame": 1000 * (time.time() - start) / (3 * 48 * (4 * frames - 3)),
            }
            rows[f"{name} x{frames // TRAINED}"] = [judge(x, codec) | cost for x in seeds]
            clips[name] = seeds[0]
    report = {"rows": rows, "seconds": minutes, "total": time.time() - began}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    table([out])

    shown = [0, 17, 34, 47]  # all colours, shapes and directions
    tiles = []
    for name, latents in clips.items():
        video = codec.decode(latents[shown])
        columns = [round(i) for i in torch.linspace(0, video.shape[2] - 1, 8).tolist()]
        tiles += [
            media.to_frames(video[row])[column].numpy() for row in range(4) for column in columns
        ]
        print(f"sheet: 4 rows of {name}")
    files.write_sheet(out / "sheet.png", tiles, columns=8)
    curves([out / name for name in ("dmd", "dmd-data", "ode", "ar", "teacher")])


def table(runs: list[Path]) -> None:
    """Print the reports of one run (mean and spread over sampling seeds) or of several (over training seeds)."""
    reports = [json.loads((run / "report.json").read_text()) for run in runs]
    spread = f"{len(runs)} training seeds" if len(runs) > 1 else "3 sampling seeds"
    print(
        f"\n{'stage, length':14}{'steps':>6}{'ms/frame':>9}",
        *[f"{c:>16}" for c in COLUMNS],
        f"  mean +- sd, {spread}",
    )
    for name, found in reports[0]["rows"].items():
        values = torch.tensor(
            [[[one[c] for c in COLUMNS] for one in report["rows"][name]] for report in reports]
        )
        values = values.mean(1) if len(runs) > 1 else values[0]
        pairs = zip(values.mean(0), values.std(0), strict=True)
        print(
            f"{name:14}{found[0]['steps']:6}{found[0]['ms_per_frame']:9.2f}",
            *[f"{m:8.3f} +-{s:5.3f}" for m, s in pairs],
        )
    for run, report in zip(runs, reports, strict=True):
        minutes = ", ".join(f"{k} {v / 60:.1f}" for k, v in report["seconds"].items())
        print(f"{run}, minutes: {minutes}; in all {report['total'] / 60:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="out/demo")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clips", type=int, default=1536)
    parser.add_argument("--steps", type=int, help="of every stage, for a quick look")
    parser.add_argument(
        "--table", nargs="+", type=Path, metavar="DIR", help="only print the table of these runs"
    )
    args = parser.parse_args()
    try:
        table(args.table) if args.table else main(args)
    except ValueError as error:
        sys.exit(f"demo.py: error: {error}")

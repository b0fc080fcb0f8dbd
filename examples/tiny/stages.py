"""Healthy and sick runs of every stage, side by side: figures and pictures of docs/stages.md.

    make demo                                                  # or several, with --seed and --out
    python examples/tiny/stages.py --demos out/demo --jobs 2   # an hour: every sickness once a demo
    python examples/tiny/stages.py --demos out/demo out/demo-1 --only critic-slow lr-high
    python examples/tiny/stages.py --demos out/demo out/demo-1 --write docs

A sickness (sick.py) is a stage of a finished demo trained again with a known fault, or a healthy
model sampled in a wrong way. Each leaves two small files in the demo's folder, stages/NAME.json and
stages/NAME.png, from which --write makes everything; what is there is not made again, unless it was
judged at fewer lengths than are asked for, and refused if it is of another config or other data.
Each is a process of one thread, which prints to stages/NAME.log; SIGTERM saves what is at work: the
same command goes on.
"""

import argparse
import time
from pathlib import Path

import ablations
import demo
import torch
from jobs import Job, Origin, command, known, parse, run_jobs, said
from PIL import Image
from show import check_demos
from sick import CASES, Case, has_curves, is_trained, mode_of
from stages_show import binned, write
from torch import Tensor

from wan5b.data import Store, TextStore
from wan5b.dit import PRESETS, WanDiT
from wan5b.extras.cli import script
from wan5b.extras.formats import load_dit, load_vae
from wan5b.extras.log import METRICS, read_metrics
from wan5b.extras.media import to_frames
from wan5b.extras.sampling import generate
from wan5b.extras.shards import write_shard
from wan5b.util import first_line, replacing, write_json
from wan5b.weights import save_dit

BEFORE = {"teacher": "init", "ar": "teacher", "dmd": "ode"}  # what a stage starts from
INIT = "init.safetensors"  # of a demo: where its teacher starts
STILL = "ablations/ar-still/latents"  # the demo's clips with their first frame all along
ENDS = (1, 3, 9, 27, 54, 90)  # latent frames whose last pixel frame is kept
KEPT = (0, 14)  # of JUDGED: the captions of these frames

# ---------------------------------------------------------------------------------------- training


def weights_of(run: Path, name: str, quick: bool = False) -> Path:
    """The weights that a case samples, trained if they are not there.

    FloatingPointError if its training diverges.
    """
    case = CASES[name]
    if not is_trained(case):
        return demo.export(run, case.source)
    if BEFORE[case.beside] == "init":
        first_weights(run)
    if case.still:
        still_clips(run)
    out = folder(run, name, quick)
    return ablations.train_stage(run, case.beside, out, keys_of(run, case), quick)[0]


def keys_of(run: Path, case: Case) -> dict:
    """Of the stage's toml, for a case that is trained."""
    if case.beside == "dmd":
        row = ablations.Row(case.about, case.keys, start=case.start or BEFORE["dmd"])
        return ablations.keys_of(run, row)
    before = BEFORE[case.beside]
    start = run / INIT if before == "init" else demo.export(run, before)
    latents = run / (STILL if case.still else "latents")
    return case.keys | {"weights": start, "latents": latents}


def origin(run: Path, name: str, quick: bool = False) -> Origin:
    """What a case's result is made of."""
    case = CASES[name]
    if not is_trained(case):
        return Origin(demo.export(run, case.source))
    out = folder(run, name, quick)
    return ablations.origin_of(run, case.beside, out, keys_of(run, case), quick)


def first_weights(run: Path) -> None:
    """Those that the demo's teacher started from, made again if they are not there."""
    if not (run / INIT).exists():
        save_dit(demo.carrying(WanDiT(PRESETS["tiny"])), run / INIT, {})


def folder(run: Path, name: str, quick: bool = False) -> Path:
    """Of the run that a case trains, or samples."""
    case = CASES[name]
    return ablations.kept(run, quick) / name if is_trained(case) else run / case.source


def kept(run: Path, quick: bool) -> Path:
    """Where results lie; those of --quick never among others."""
    return run / ("stages-quick" if quick else "stages")


def still_clips(run: Path) -> None:
    """Write the store STILL. One that is there may be of other clips than the demo's now."""
    store = Store(run / "latents")
    first = torch.stack([store[i]["latent"][:, :1] for i in range(len(store))])
    latents = first.expand(-1, -1, demo.TRAINED, -1, -1)
    write_shard(run / STILL / "00000.safetensors", {"latent": latents}, store.prompts)


# ---------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def sampled(case: Case, model: WanDiT, text: TextStore, frames: int) -> Tensor:
    """Latents [24, C, frames, 4, 4] as the healthy run is sampled, but for what the case says.

    The same noise for all cases of one length.
    """
    mode = mode_of(case, demo.SAMPLED)
    how = {"causal": mode.causal, "solver": "renoise", "sigmas": demo.levels(mode)}
    if mode.guided:
        how |= {"solver": "euler", "guidance": 2.0}
    chunks = [frames]
    if mode.causal:
        how["window"] = demo.WINDOW
        chunks = [demo.CHUNK] * (frames // demo.CHUNK)
    how |= case.how

    prompts = [str(label) for label in demo.JUDGED]
    if "guidance" in how:
        prompts += [""] * len(demo.JUDGED)
    context = text.batch(prompts, model.cfg.text_len)
    shape = (len(demo.JUDGED), model.cfg.in_dim, frames, demo.SIDE, demo.SIDE)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(demo.SAMPLING_SEED))
    made = generate(model, noise, context, chunks=chunks, seed=demo.SAMPLING_SEED, **how)
    return torch.cat(list(made), 2)


def scored(latents: Tensor, codec) -> dict[str, dict[str, float]]:
    """Length -> the demo's scores, and what training logs of rollouts: motion and spread of x0."""
    found = {}
    for length, scores in demo.at_lengths(demo.judge(latents, codec)).items():
        part = latents[:, :, demo.TRAINED * (length - 1) : demo.TRAINED * length]
        own = {"motion": float(part.var(2, correction=0).mean()), "spread": float(part.std())}
        found[str(length)] = scores | own
    return found


def keep_frames(path: Path, latents: Tensor, codec) -> None:
    """A PNG of 64x64 frames: a row a caption of KEPT, a column an end of ENDS that is there."""
    ends = [end for end in ENDS if end <= latents.shape[2]]
    kept = latents[list(KEPT)]
    frames = [demo.decoded(kept, codec, end - 1, end)[:, :, -1] for end in ends]
    rows = [torch.cat(list(row), 2) for row in torch.stack(frames, 1)]  # [3, 64, 64 n] each
    picture = to_frames(torch.cat(rows, 1)[:, None])[0]
    with replacing(path) as partial:
        Image.fromarray(picture.numpy()).save(partial, "PNG")


# -------------------------------------------------------------------------------------------- runs


def measure(run: Path, name: str, longest: int, quick: bool = False) -> None:
    """Train, sample and judge one case of one demo, unless that has been done."""
    case = CASES[name]
    length = length_of(case, longest)
    result = kept(run, quick) / f"{name}.json"
    made_of = origin(run, name, quick)
    if is_done(known(result, case, made_of), length):
        return
    print(f"== {run} {name}: {case.about}", flush=True)
    began = time.time()
    captions = [str(demo.JUDGED[i]) for i in KEPT]
    found = {"ended": "", "scores": {}, "captions": captions}
    try:
        model = load_dit(weights_of(run, name, quick))
    except FloatingPointError as error:  # that too is a way to be sick
        found["ended"] = first_line(error).partition(":")[0]
    else:
        codec = load_vae(run / "release")
        latents = sampled(case, model, TextStore(run / "text"), demo.TRAINED * length)
        found["scores"] = scored(latents, codec)
        keep_frames(result.with_suffix(".png"), latents, codec)

    rows = read_metrics(folder(run, name, quick) / METRICS) if has_curves(case) else []
    found["curves"] = binned(rows, case.beside)
    found |= {"seconds": time.time() - began, "of": said(case), "origin": made_of.note()}
    write_json(result, found)


def is_done(found: dict | None, length: int) -> bool:
    """Whether a result is there, judged up to this length or further, or diverged."""
    return bool(found) and (bool(found["ended"]) or str(length) in found["scores"])


def results(runs: list[Path], quick: bool = False) -> dict[str, list[dict]]:
    """Case -> what each demo has of it, in the order of CASES; those that no demo has are left
    out.
    """
    found = {}
    for name, case in CASES.items():
        there = []
        for run in runs:
            result = kept(run, quick) / f"{name}.json"
            there.append(known(result, case, origin(run, name, quick)))
        if any(there):
            found[name] = [each for each in there if each]
    return found


def length_of(case: Case, longest: int) -> int:
    """Up to which length a case is judged: clips that are made at once, as the stage is trained."""
    return longest if mode_of(case, demo.SAMPLED).causal else 1


def measure_all(
    runs: list[Path], names: list[str], at_once: int, longest: int, quick: bool = False
) -> None:
    """All that is not done, so many at a time, each in a process of one thread: see `run_jobs`."""
    check_demos(runs)
    todo = []
    for name in dict.fromkeys(names):
        case = CASES[name]
        for run in runs:
            beside = kept(run, quick)
            found = known(beside / f"{name}.json", case, origin(run, name, quick))
            if is_done(found, length_of(case, longest)):
                continue
            given = {"run": str(run), "name": name, "longest": longest, "quick": quick}
            log = beside / f"{name}.log"
            cost = float(is_trained(case))
            todo.append(Job(f"{run} {name}", command(__file__, given), log, cost))
    run_jobs(todo, at_once)


def run_one(given: dict) -> None:
    """What `measure_all` has one of its processes do."""
    measure(Path(given["run"]), given["name"], given["longest"], given["quick"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--demos", nargs="+", type=Path, default=[], metavar="DIR", help="finished demos")
    add("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help="of sick.py")
    add("--jobs", type=int, default=1, help="at a time, each on one core")
    quick = f"{ablations.QUICK['steps']} steps a training, kept apart"
    add("--quick", action="store_true", help=f"whether all works: {quick}")
    add("--longest", type=int, choices=demo.LENGTHS[:3], default=10, help="up to where is judged")
    add("--write", type=Path, metavar="DOCS", help="only make DOCS/stages/*.png, fill in stages.md")
    args = parse(parser, run_one)
    ablations.note_demos(args.demos)
    if args.write:
        check_demos(args.demos)
        write(args.write, args.demos, results(args.demos))
    else:
        measure_all(args.demos, args.only, args.jobs, args.longest, args.quick)


if __name__ == "__main__":
    script(main)

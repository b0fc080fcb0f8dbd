"""What is damaged: whole files of every format that is read, and how each of them is read.

`make(folder)` writes the files; `subjects(folder)` lists them. Only tiny models, clips and runs.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib import import_module
from itertools import islice
from os import devnull
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import odd_files
import torch
import training
from PIL import Image
from release import make_release
from scripts import run

import prepare
import sample
import train
from wan5b import fsdp
from wan5b.data import Data, Store, TextStore
from wan5b.extras import checkpoints, formats, log, pictures
from wan5b.extras.files import read_prompts
from wan5b.weights import save_dit

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHARDS = [f"diffusion_pytorch_model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]


class Subject(NamedTuple):
    """A file to damage."""

    format: str  # a row of the table
    folder: str  # what is copied for each damage, below the folder of whole files
    file: str  # in it
    read: Callable[[Path], Any]  # the folder -> everything that was read
    form: str = ""  # see damage.FORMS
    # What the format carries that shows damage: "sums" shows any, "size" what is cut off.
    shows: str = ""


# -------------------------------------------------------------------------------------- whole files

VIDEOS = {
    "mp4": {"codec": "libx264", "container": {"movflags": "faststart"}},
    "mov": {"codec": "mpeg4"},
    "mkv": {"codec": "libx264", "sound": True},
    "webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "avi": {"codec": "mpeg4"},
    "ts": {"codec": "mpeg2video"},
}
PICTURES = {
    "a.png": {},
    "exif.jpg": {"quality": 90},
    "a.webp": {"quality": 80},
    "lossless.webp": {"lossless": True},
    "a.gif": {},
    "a.bmp": {},
    "a.tiff": {"compression": "tiff_lzw"},
    "a.avif": {},
    "a.ppm": {},
    "a.tga": {"rle": True},
    "a.jp2": {},
    "a.ico": {},
}


def make(folder: Path) -> None:
    """All whole files, below the folder."""
    make_release(folder / "release")
    (folder / "release/prompts.txt").write_text("A red fox\nзима, 冬天\n")
    shutil.copytree(GOLDEN / "formats", folder / "formats")
    shutil.copytree(GOLDEN / "longlive2", folder / "longlive2")
    for lora in sorted((folder / "formats/lora").glob("*.*")):
        shutil.copytree(folder / "formats/original", folder / f"lora-{lora.name}")
        shutil.copy(lora, folder / f"lora-{lora.name}")
    shutil.copytree(folder / "formats/original", folder / "lora-peft")
    shutil.copytree(folder / "formats/lora/peft", folder / "lora-peft/peft")

    # What trainers and this one write.
    model = formats.load_dit(folder / "release")
    for name in ("export", "trainer"):
        (folder / name).mkdir()
        shutil.copy(folder / "release/config.json", folder / name)
    said = {"stage": "dmd", "step": 3, "levels": [1000, 750, 500, 250], "shift": 5.0, "chunk": 3}
    said |= {"prefix": None, "window": None, "training": {"lr": 1e-4}, "data": {}}
    save_dit(model, folder / "export/x.safetensors", said)
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}
    held = {"generator_ema": model.state_dict(), "step": 3, "optimizer": optimizer}
    torch.save(held, folder / "trainer/x.pt")
    _make_run(folder / "finished")
    shutil.copytree(folder / "finished", folder / "run")
    (folder / "run/out/dmd.safetensors").unlink()
    _make_media(folder / "media")
    _make_texts(folder)
    shutil.copytree(ROOT / "configs", folder / "configs")


def _make_run(folder: Path) -> None:
    """Data of training, and a run of two steps that has saved both."""
    training.make_data(folder)
    given = training.values(folder, "dmd", folder / "out", steps=2, save_every=1, ema=0.5)
    relative = {key: _relative(value, folder) for key, value in given.items()}
    training.write_toml(folder / "run.toml", relative)
    with redirect_stdout(open(devnull, "w")):
        training.finish(train.Config(**given))
    (folder / "out/lock").unlink()


def _relative(value: Any, folder: Path) -> Any:
    return value.removeprefix(f"{folder}/") if isinstance(value, str) else value


def _make_media(folder: Path) -> None:
    folder.mkdir()
    frames = np.stack([np.asarray(odd_files.picture(64, 96, seed)) for seed in range(14)])
    for suffix, options in VIDEOS.items():
        odd_files.write_video(folder / f"a.{suffix}", frames, rate=12, **options)
    image = odd_files.picture(60, 90)
    for name, options in PICTURES.items():
        if name.startswith("exif"):
            exif = Image.Exif()
            exif[0x0112] = 6
            options = options | {"exif": exif, "icc_profile": odd_files.profile()}
        image.save(folder / name, **options)
    image.convert("L").save(folder / "gray.png")
    image.convert("P").save(folder / "palette.png", transparency=3)


def _make_texts(folder: Path) -> None:
    texts = folder / "texts"
    texts.mkdir()
    (texts / "prompts.txt").write_text("A red fox in deep snow\n\nзима, 冬天\nIt rests\n")
    for name in ("a", "b"):
        shutil.copy(folder / "media/a.mp4", texts / f"{name}.mp4")
        (texts / f"{name}.txt").write_text(f"clip {name}\nof noise\n")
    rows = [{"video": f"{name}.mp4", "caption": f"clip {name}"} for name in ("a", "b")]
    (texts / "list.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    options = ["--random-weights", "--preset", "tiny", "--size", "32x32", "--frames", "9"]
    options += ["--prompt", "noise", "--chunk", "1", "--latents", "--out", str(texts / "clip")]
    run("sample.py", options, texts)
    record = json.loads((texts / "clip.json").read_text())
    record["settings"]["out"] = "again"
    (texts / "clip.json").write_text(json.dumps(record))


# ------------------------------------------------------------------------------------------ readers


def dit(name: str = "", **options) -> Callable:
    """Reads a DiT as sample.py does: sizes, what it says of itself, and all weights."""

    def read(folder: Path):
        path = folder / name
        cfg, _ = formats.open_dit(path, **options)
        said = formats.read_metadata(path)
        return cfg, said, formats.load_dit(path, **options).state_dict()

    return read


def with_lora(name: str) -> Callable:
    return lambda folder: dit(loras=[(folder / name, 1.0)])(folder)


def vae(name: str = "") -> Callable:
    return lambda folder: formats.load_vae(folder / name).state_dict()


def text_encoder(name: str = "") -> Callable:
    def read(folder: Path):
        model = formats.load_t5(folder / name)
        tokens = formats.load_tokenizer(folder / name, 32)(["A red fox. Зима, 冬天\n\t x1"])
        return model.cfg, model.state_dict(), tokens

    return read


def store(folder: Path):
    held = Store(folder)
    return held.prompts, held.facts, [held[i] for i in range(len(held))]


def texts(folder: Path):
    held = TextStore(folder)
    return held.facts, held.prompts, [held[prompt] for prompt in held.prompts]


def resumed(folder: Path):
    """What a run that goes on reads; its own start is among the checkpoint's facts."""
    cfg = train.parse([str(folder / "run.toml"), "steps=4"])
    world = fsdp.World("cpu")
    saved = checkpoints.complete(Path("out"))[-1]
    formats.check_checkpoint(saved)
    said = formats.read_metadata(saved)
    built = train.build(cfg, world)
    facts = checkpoints.load(world, saved, built.optimizers)
    rows = log.read_metrics(Path("out/metrics.jsonl"))
    return said, facts, rows, {who: each.state() for who, each in built.optimizers.items()}


def from_checkpoint(folder: Path):
    return dit("out/step-0000002")(folder)


def data(folder: Path):
    held = Data(train.parse([str(folder / "run.toml")]))
    return held.prompts, [held.text[prompt] for prompt in held.prompts]


def image(name: str) -> Callable:
    return lambda folder: pictures.read_image(folder / name)


def video(name: str) -> Callable:
    def read(folder: Path):
        last = pictures.read_video(folder / name, 5, 24)
        clips = list(islice(pictures.read_clips(folder / name, 9, 24), 2))
        return pictures.read_video(folder / name), last, clips

    return read


def settings(folder: Path):
    return vars(sample.parse(["--settings", str(folder / "clip.json")]))


# --------------------------------------------------------------------------------------------- list


def subjects(folder: Path) -> list[Subject]:
    """Everything that is read, script by script at the end."""
    return [*_models(folder), *_ours(), *_configs(folder), *_media(), *_scripts(folder)]


def _models(folder: Path) -> list[Subject]:
    """Weights, their configs and their indices, in the layouts of all programs."""
    tensors = {"form": "safetensors", "shows": "size"}
    zips = {"form": "zip", "shows": "sums"}
    original, pipeline = "formats/original", "formats/diffusers"
    t5 = "models_t5_umt5-xxl-enc-bf16.pth"
    found = [
        Subject("safetensors, original", "release", SHARDS[1], dit(), **tensors),
        Subject("index of shards", "release", INDEX, dit(), "json", "size"),
        Subject("config.json, original", "release", "config.json", dit(), "json"),
        Subject("VAE .pth", "release", "Wan2.2_VAE.pth", vae(), **zips),
        Subject("text encoder .pth", "release", t5, text_encoder(), **zips),
        Subject("spiece.model", original, "google/umt5-xxl/spiece.model", text_encoder()),
        Subject("export", "export", "x.safetensors", dit("x.safetensors"), **tensors),
        Subject("trainer's .pt", "trainer", "x.pt", dit("x.pt"), **zips),
        Subject("LongLive .pt", "longlive2", "model_bf16.pt", dit("model_bf16.pt"), **zips),
    ]
    for part, read in (("transformer", dit()), ("vae", vae()), ("text_encoder", text_encoder())):
        inside = sorted(file.name for file in (folder / pipeline / part).iterdir())
        for name in inside:
            form = {"form": "json"} if name.endswith(".json") else tensors
            kind = "safetensors" if form is tensors else name.rpartition(".index")[2]
            row = f"diffusers {kind}"
            found.append(Subject(row, pipeline, f"{part}/{name}", read, **form))
    for file in sorted((folder / "formats/comfy").glob("*.safetensors")):
        read = vae if "vae" in file.name else text_encoder if "umt5" in file.name else dit
        if file.name == "umt5-xxl-enc-fp8_e4m3fn.safetensors":
            continue  # without a tokenizer, and otherwise as its neighbours
        row = "ComfyUI, scaled float8" if "scaled" in file.name else "ComfyUI"
        found.append(Subject(row, "formats/comfy", file.name, read(file.name), **tensors))
    for lora in sorted(folder.glob("lora-*.*")):
        name = lora.name.removeprefix("lora-")
        form = zips if name.endswith(".pt") else tensors
        found.append(Subject("LoRA", lora.name, name, with_lora(name), **form))
    peft = with_lora("peft")
    found.append(Subject("LoRA", "lora-peft", "peft/adapter_model.safetensors", peft, **tensors))
    row = "adapter_config.json"
    return [*found, Subject(row, "lora-peft", f"peft/{row}", peft, "json")]


def _ours() -> list[Subject]:
    """What train.py, prepare.py and sample.py write, and the texts that they take."""
    tensors = {"form": "safetensors", "shows": "size"}
    shard = "00000.safetensors"
    step = "out/step-0000002"
    found = [
        Subject("store of text", "run/text", shard, texts, **tensors),
        Subject("store of latents", "run/latents", shard, store, **tensors),
        Subject("store of trajectories", "run/ode", shard, store, **tensors),
        Subject("store of text", "run", f"text/{shard}", data, **tensors),
        Subject("metrics.jsonl", "run", "out/metrics.jsonl", resumed, "jsonl"),
        Subject("settings JSON", "texts", "clip.json", settings, "json"),
        Subject("TOML", "run", "run.toml", lambda at: train.parse([str(at / "run.toml")]), "toml"),
        Subject(
            "prompts", "texts", "prompts.txt", lambda at: read_prompts(at / "prompts.txt"), "lines"
        ),
        Subject("captions", "texts", "a.txt", lambda at: captions(at / "clips"), "lines"),
        Subject(
            "list of videos",
            "texts",
            "list.jsonl",
            lambda at: prepare.list_videos(at / "list.jsonl"),
            "jsonl",
        ),
    ]
    for read in (resumed, from_checkpoint):
        found += [
            Subject("checkpoint, facts.json", "run", f"{step}/facts.json", read, "json"),
            Subject("checkpoint, index", "run", f"{step}/.metadata", read, "index"),
            Subject("checkpoint, .distcp", "run", f"{step}/__0_0.distcp", read, "", "sums"),
        ]
    return found


def _configs(folder: Path) -> list[Subject]:
    """The configs of the 5B's runs, and of how clips are made, if there are any."""
    found = []
    for path in sorted((folder / "configs").rglob("*.toml")):
        name = str(path.relative_to(folder / "configs"))
        row = "TOML, sample" if "/" in name else "TOML"
        found.append(Subject(row, "configs", name, config(name), "toml"))
    return found


def config(name: str) -> Callable:
    """Reads a config: of train.py, or what sample.py calls a recipe."""
    if "/" not in name:
        return lambda at: train.parse([str(at / name)])
    return lambda at: import_module("wan5b.extras.recipes").load(str(at / name))


def captions(folder: Path) -> list:
    """Of a folder that holds nothing but clips and their captions."""
    folder.mkdir()
    for file in folder.parent.glob("[ab].*"):
        shutil.copy(file, folder)
    return prepare.list_videos(folder)


def _media() -> list[Subject]:
    found = []
    for name in [*PICTURES, "gray.png", "palette.png"]:
        shows = "sums" if name.endswith("png") else "size"
        row = Path(name).suffix[1:].upper()
        found.append(Subject(row, "media", name, image(name), "", shows))
    for suffix in VIDEOS:
        shows = "" if suffix == "ts" else "size"
        found.append(Subject(suffix, "media", f"a.{suffix}", video(f"a.{suffix}"), "boxes", shows))
    return found


def _scripts(folder: Path) -> list[Subject]:
    """The same files through whole scripts."""
    tensors = {"form": "safetensors", "shows": "size"}
    zips = {"form": "zip", "shows": "sums"}
    release = ["--release", str(folder / "release")]
    small = ["--size", "32x32", "--frames", "9", "--chunk", "1", "--latents", "--prompt", "A fox"]
    step = "out/step-0000002"
    again = ["run.toml", "steps=3"]
    anew = ["run.toml", "steps=1", "out=new"]
    clip = ["--size", "32x32", "--frames", "9", "--out", "store"]
    text = ["text", "--release", ".", "--out", "store", "--prompts", "prompts.txt"]
    latents = ["latents", *release, *clip, "--videos", "list.jsonl"]
    tune = {
        "sample.py": ["--release", ".", *small],
        "image": [*release, "--image", "exif.jpg", *small],
        "video": [*release, "--video", "a.webm", "--prefix", "5", *small],
    }
    listed = [
        ("shard", "release", SHARDS[0], "sample.py", tune["sample.py"], tensors),
        ("VAE", "release", "Wan2.2_VAE.pth", "sample.py", tune["sample.py"], zips),
        ("config.json", "release", "config.json", "sample.py", tune["sample.py"], {"form": "json"}),
        ("image", "media", "exif.jpg", "sample.py", tune["image"], {"shows": "size"}),
        ("video", "media", "a.webm", "sample.py", tune["video"], {"form": "boxes"}),
        (
            "settings",
            "texts",
            "clip.json",
            "sample.py",
            ["--settings", "clip.json"],
            {"form": "json"},
        ),
        ("store", "run", "text/00000.safetensors", "train.py", anew, tensors),
        ("TOML", "run", "run.toml", "train.py", again, {"form": "toml"}),
        ("facts.json", "run", f"{step}/facts.json", "train.py", again, {"form": "json"}),
        ("index", "run", f"{step}/.metadata", "train.py", again, {"form": "index"}),
        (".distcp", "run", f"{step}/__0_0.distcp", "train.py", again, {"shows": "sums"}),
        ("metrics", "run", "out/metrics.jsonl", "train.py", again, {"form": "jsonl"}),
        ("finished", "finished", "out/dmd.safetensors", "train.py", ["run.toml"], tensors),
        ("prompts", "release", "prompts.txt", "prepare.py", text, {"form": "lines"}),
        ("spiece", "release", "google/umt5-xxl/spiece.model", "prepare.py", text, {}),
        ("videos", "texts", "a.mp4", "prepare.py", latents, {"form": "boxes"}),
    ]
    found = []
    for what, source, file, name, options, rest in listed:

        def read(at: Path, name=name, options=options):
            return run(name, options, at)

        found.append(Subject(f"{name}: {what}", source, file, read, **rest))
    return found

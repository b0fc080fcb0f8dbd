"""A small model of the tiny world, which comes with the repository: what `make live` shows.

    python examples/tiny/small.py             # out/live: a release and the model for it, in seconds
    python examples/tiny/small.py --train FILE   # trains it again, on one core

Afterwards the model is an ordinary release plus export:
    .venv/bin/python sample.py --release out/live/release --weights out/live/small.safetensors \\
        --prompt "a red ring moves left" --size 64x64 --frames 105 --sheet

It is not made by the stages of the demo, but for steering: teacher forcing alone, at the levels of
sampling, on drawn clips whose caption may change at a chunk's edge: the shape turns, takes another
colour or becomes another shape. Behind clean context there is one way to go on, so a regression is
a few-step model already. A first chunk has 16 places to choose from: at sigma 1 the one is asked
for that two means of the noise name. That is not learned; first chunks are the model's weakness.

The file is small since layers share their weights, most matrices are products of two narrow ones,
and numbers are int8 with a scale for each row. `unpack` makes an ordinary network of it.
"""

import argparse
import math
import sys
import time
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from world import COLOURS, DIRECTIONS, LABELS, PHASE, SHAPES, SIZE, codec_basis, shape_mask

# The repository: its scripts are imported, not installed.
sys.path.insert(0, str(Path(__file__).parents[2]))

from demo import TRAINED, carrying, make_release
from safetensors.torch import load_file

from wan5b.dit import DiTConfig, WanDiT
from wan5b.extras.cli import script
from wan5b.extras.formats import load_t5, load_tokenizer
from wan5b.extras.tensor_files import new_folder
from wan5b.extras.texts import encode_prompts
from wan5b.flow import add_noise, few_step_sigmas
from wan5b.util import write_tensors
from wan5b.weights import save_dit

SHIPPED = Path(__file__).with_name("small.safetensors")
CONFIG = DiTConfig(192, 256, 6, 2, text_dim=64, text_len=24, freq_dim=32)
# Of the matrices that are products of two: their inner width. Five levels (with the clean one) have
# five embeddings, captions are made of a dozen words.
RANKS = {
    "time_embedding.2": 8,
    "time_projection.1": 8,
    "text_embedding.2": 32,
    "self_attn.q": 64,
    "self_attn.k": 64,
    "cross_attn.q": 32,
    "cross_attn.k": 32,
    "cross_attn.v": 32,
    "cross_attn.o": 32,
}
SHARED = ("self_attn", "cross_attn", "ffn", "norm3")  # by all layers; each has its own modulation
LEVELS = (1000, 500, 250)
SIGMAS = few_step_sigmas(LEVELS)
BATCH = 16
CHUNK = 3  # latent frames
GRID = SIZE // PHASE  # places in a row or a column of the torus

# ----------------------------------------------------------------------------------------- network


class LowRank(nn.Module):
    """A linear layer whose matrix [out, in] is left [out, r] @ right [r, in]."""

    def __init__(self, layer: nn.Linear, rank: int):
        super().__init__()
        self.left = nn.Parameter(torch.randn(layer.out_features, rank) / rank**0.5)
        fans = layer.in_features + layer.out_features
        self.right = nn.Parameter(torch.randn(rank, layer.in_features) * (2 / fans) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(layer.out_features))

    @property
    def weight(self) -> Tensor:
        return self.left @ self.right

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.right), self.left, self.bias)


def narrow() -> WanDiT:
    """The network of the shipped file, with random weights."""
    model = WanDiT(CONFIG)
    for name, layer in list(model.named_modules()):
        for end, rank in RANKS.items():
            if name.endswith(end):
                parent, _, key = name.rpartition(".")
                setattr(model.get_submodule(parent), key, LowRank(layer, rank))
    for block in model.blocks[1:]:
        for key in SHARED:
            setattr(block, key, getattr(model.blocks[0], key))
    return model


def widened(model: WanDiT) -> WanDiT:
    """The same network as a plain WanDiT."""
    plain = WanDiT(model.cfg)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parent, _, key = name.rpartition(".")
            parameter.copy_(getattr(model.get_submodule(parent), key))
    return plain.eval()


def pack(model: WanDiT, path: Path) -> None:
    """Write a narrow network: matrices as int8 with a scale for each row, the rest as it is."""
    tensors = {}
    for name, parameter in model.named_parameters():  # shared ones once
        tensor = parameter.detach()
        if tensor.ndim > 1 and "modulation" not in name:
            rows = tensor.flatten(1)
            scale = rows.abs().amax(1).clamp(min=1e-12) / 127
            tensors[f"{name}.scale"] = scale
            tensor = (rows / scale[:, None]).round().to(torch.int8).view(tensor.shape)
        tensors[name] = tensor
    write_tensors(path, tensors)


def unpack(path: Path) -> WanDiT:
    """What `pack` wrote, as a plain WanDiT."""
    held = load_file(path)
    state = {}
    for name, tensor in held.items():
        if name.endswith(".scale"):
            continue
        if tensor.dtype == torch.int8:
            scale = held[f"{name}.scale"].view(-1, *[1] * (tensor.ndim - 1))
            tensor = tensor * scale
        state[name] = tensor
    model = narrow()
    names = dict(model.named_parameters())
    assert names.keys() == state.keys(), names.keys() ^ state.keys()
    with torch.no_grad():
        for name, parameter in names.items():
            parameter.copy_(state[name])
    return widened(model)


def release_in(out: Path) -> Path:
    """out/release, which is made if it is not there."""
    release = out / "release"
    if not release.exists():
        with new_folder(release) as partial:
            make_release(partial)
    return release


def make_live(out: Path) -> None:
    """The release and the model for it."""
    release_in(out)
    said = {"levels": list(LEVELS), "shift": 5.0, "chunk": CHUNK, "window": TRAINED}
    save_dit(unpack(SHIPPED), out / "small.safetensors", said, overwrite=True)


# ----------------------------------------------------------------------------------------- drawing

# Labels are indices [..., 3] of colour, shape and direction. A place is how far, in steps of PHASE
# pixels, the shape is along its lane in the last pixel frame of a latent one.
PALETTE = torch.tensor(list(COLOURS.values()))
FORWARD = torch.tensor([sum(way) for way in DIRECTIONS.values()])  # -1 or 1


@lru_cache
def white_shapes() -> tuple[Tensor, Tensor]:
    """Latents of one colour channel for every shape, direction and place: of a video's first frame,
    and of a frame that leads to the next place, [3, 4, 16, channels, 4, 4] each.
    """
    basis, _ = codec_basis()
    masks = torch.stack([shape_mask(shape) for shape in SHAPES])
    tables = []
    for speed in (0, 1):
        planes = []
        for down, right in DIRECTIONS.values():
            for place in range(GRID):
                for t in range(1, 5):
                    along = PHASE * place * (down + right)
                    far = along + speed * t
                    planes.append(masks.roll((far * down, far * right), (1, 2)))
        planes = torch.stack(planes, 1)  # [3, 4 * 16 * 4, 64, 64]
        planes = planes.unflatten(1, (-1, 1, 4)).flatten(0, 1)
        latents = F.conv3d(planes, basis, stride=basis.shape[2:])[:, :, 0]
        tables.append(latents.unflatten(0, (len(SHAPES), len(DIRECTIONS), GRID)))
    return tuple(tables)


def draw_chunk(label: Tensor, place: Tensor, opens: bool) -> tuple[Tensor, Tensor]:
    """What the world shows from a place on, latents [..., 48, 3, 4, 4], and the place after it.

    opens: it is a video's first chunk.
    """
    standing, moving = white_shapes()
    colour, shape, direction = label.unbind(-1)
    frames = []
    for t in range(CHUNK):
        if opens and t == 0:
            white = standing[shape, direction, place]
        else:
            white = moving[shape, direction, place]
            place = (place + FORWARD[direction]) % GRID
        latent = PALETTE[colour][..., None, None, None] * white[..., None, :, :, :]
        frames.append(latent.flatten(-4, -3))
    return torch.stack(frames, -3), place


def place_of(noise: Tensor) -> Tensor:
    """Where a first chunk's noise [B, C, 3, 4, 4] puts the shape, [B]: evenly spread."""
    means = noise.mean((2, 3, 4))
    angle = torch.atan2(means[:, 0], means[:, 16])
    return (angle * (GRID / (2 * math.pi))).round().long() % GRID


def random_labels(batch: int, chunks: int, switched: Tensor) -> Tensor:
    """Labels [B, chunks, 3] that change at chunk `switched` [B] (0: never), some words excepted."""
    kinds = (len(COLOURS), len(SHAPES), len(DIRECTIONS))
    old, new = (torch.stack([torch.randint(n, (batch,)) for n in kinds], 1) for _ in range(2))
    new = torch.where(torch.rand(batch, 3) < 0.35, old, new)
    behind = (torch.arange(chunks) >= switched[:, None]) & (switched > 0)[:, None]
    return torch.where(behind[..., None], new[:, None], old[:, None])


# ---------------------------------------------------------------------------------------- training


def initial() -> WanDiT:
    """A narrow network that carries its input through (see `demo.carrying`), to train from."""
    model = narrow()
    plain = carrying(WanDiT(CONFIG))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith((".left", ".right", "bias")):
                parameter.copy_(plain.get_parameter(name))
        model.blocks[0].cross_attn.o.left.zero_()
    return model


def captions(release: Path) -> Tensor:
    """The context of every label, [4, 3, 4, L, D], as sample.py makes it."""
    tokenizer = load_tokenizer(release, CONFIG.text_len)
    encoder = load_t5(release, "cpu", torch.bfloat16)
    with torch.no_grad():
        rows = [encode_prompts(encoder, tokenizer, [str(label)]) for label in LABELS]
    return (
        torch.cat(rows).float().view(len(COLOURS), len(SHAPES), len(DIRECTIONS), *rows[0].shape[1:])
    )


def forced_loss(model: WanDiT, contexts: Tensor, batch: int = BATCH) -> float:
    """Teacher forcing on drawn clips of three chunks, each at a level of its own.

    There is one text for all of a forward: the last one. Where it is another one than a chunk's
    own, that chunk is context alone.
    """
    chunks = TRAINED // CHUNK
    switched = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])[torch.randint(9, (batch,))]
    labels = random_labels(batch, chunks, switched)
    noise = torch.randn(batch, CONFIG.in_dim, TRAINED, 4, 4)
    sigma = torch.tensor(SIGMAS)[torch.randint(len(SIGMAS) - 1, (batch, chunks))]

    # Clips without a switch are videos' beginnings, others are out of the middle of a video.
    opens = switched == 0
    named = opens & (sigma[:, 0] == 1)
    place = torch.where(named, place_of(noise[:, :, :CHUNK]), torch.randint(GRID, (batch,)))
    clean = []
    for k in range(chunks):
        drawn, after = draw_chunk(labels[:, k], place, opens=False)
        if k == 0:
            first, after_first = draw_chunk(labels[:, k], place, opens=True)
            drawn = torch.where(opens.view(-1, 1, 1, 1, 1), first, drawn)
            after = torch.where(opens, after_first, after)
        clean.append(drawn)
        place = after
    clean = torch.cat(clean, 2)

    sigma = sigma.repeat_interleave(CHUNK, 1)
    text = contexts[tuple(labels[:, -1].unbind(1))]
    x = add_noise(clean, noise, sigma)
    v = model(x, sigma, text, chunks=[CHUNK] * chunks, window=TRAINED, clean=clean)
    error = (v - (noise - clean)).square().unflatten(2, (chunks, CHUNK)).mean((1, 3, 4, 5))
    counts = (torch.arange(chunks) >= switched[:, None]).float()
    loss = (error * counts).sum() / counts.sum()
    loss.backward()
    return loss.item()


class Optimizer:
    """Muon for matrices inside, AdamW for the rest, and the average of the weights."""

    def __init__(self, model: WanDiT):
        self.parameters = list(model.parameters())
        inner = [w for name, w in model.named_parameters() if w.ndim == 2 and "head" not in name]
        outer = [w for name, w in model.named_parameters() if w.ndim != 2 or "head" in name]
        muon = torch.optim.Muon(inner, 8e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(outer, 2e-3, betas=(0.9, 0.99), weight_decay=0.01)
        self.optimizers = [muon, adam]
        self.rates = [8e-3, 2e-3]
        self.average = [w.detach().clone() for w in self.parameters]
        self.steps = 0

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """factor: of the rates."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
        self.steps += 1
        decay = min(0.995, self.steps / (self.steps + 10))
        torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    @torch.no_grad()
    def use_average(self) -> None:
        torch._foreach_copy_(self.parameters, self.average)


def train(path: Path, release: Path, steps: int) -> None:
    """Teacher forcing for so many steps; writes the small file."""
    if path.exists():
        raise ValueError(f"{path} exists; delete it or name another file")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    contexts = captions(release)
    model = initial()
    optimizer = Optimizer(model)
    began = time.time()
    total = 0.0
    for step in range(steps):
        total += forced_loss(model, contexts)
        warm = min(1.0, (step + 1) / 100)
        optimizer.step(warm * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
        if (step + 1) % 100 == 0:
            passed = time.time() - began
            print(f"step {step + 1}: loss {total / 100:.4f}, {passed:.0f} s", flush=True)
            total = 0.0
    optimizer.use_average()
    pack(model, path)


# -------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/live"))
    add("--train", type=Path, metavar="FILE", help="train, and write the small file there")
    add("--steps", type=int, default=4000)
    args = parser.parse_args()
    if args.train:
        train(args.train, release_in(args.out), args.steps)
    else:
        make_live(args.out)


if __name__ == "__main__":
    script(main)

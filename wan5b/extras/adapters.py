"""Training by LoRA: one frozen base for teacher, critic and generator, and small trained matrices.

A linear layer of the blocks gives x W^T + b + (alpha / rank) (x A^T) B^T (arXiv 2106.09685). W and
b are the base's and stay as they are. A [rank, in] starts random, B [out, rank] at zero; both are
float32, cast to the dtype of x.

The generator and the critic are models with layers of their own around the very parameters of the
base, which is the teacher. So whose adapters a forward had stands in its layers: the recomputation
of checkpointing, or a backward through several networks, has the same ones; nothing is switched.

What is trained is all that an optimizer, an average or a checkpoint knows: names are those of the
blocks' layers with lora_A.weight and lora_B.weight behind, as PEFT has them.

A chain of stages has one base: each goes on from the adapter of the one before (lora_weights).
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan5b import fsdp
from wan5b.dit import DiTConfig, WanDiT
from wan5b.extras import config
from wan5b.extras.config import at_least, path
from wan5b.extras.digest import NOTHING, digest
from wan5b.extras.formats import read_metadata
from wan5b.extras.lora import HEADER, read_lora
from wan5b.extras.training_attention import arrange
from wan5b.util import finite, rng, write_json, write_tensors

# A layer's two matrices, behind its name, as PEFT has them: A and B of W + scale B A.
DOWN, UP = "lora_A.weight", "lora_B.weight"
TARGETS = ("q", "k", "v", "o", "ffn.0", "ffn.2")  # all linear layers of the blocks
FILE = "adapter_model.safetensors"  # PEFT's names
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
# What PEFT's config says of a plain LoRA, beside rank, alpha and layers.
PLAIN = {
    "peft_type": "LORA",
    "task_type": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "bias": "none",
    "lora_dropout": 0.0,
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
}
Make = Callable[..., tuple[WanDiT, dict[str, Tensor]]]  # as train.network, but for cfg and world

# ------------------------------------------------------------------------------------------ options


@dataclass(frozen=True, kw_only=True)
class LoraOptions(config.Options):
    """The keys of LoRA in the config of a run."""

    lora: int = at_least(0, 0)  # rank of the adapters; 0: there are none, all weights are trained
    lora_alpha: float = at_least(0, 0.0)  # adapters count alpha / rank; 0: alpha is the rank
    lora_targets: tuple[str, ...] = TARGETS  # how the names of the layers that have one end
    # Rollouts (dmd, sid, sample videos) run over merged weights: faster, up to 10 GB more of a 5B
    lora_merge: bool = True
    lora_weights: str = path()  # where it starts: the adapter of the stage before, over `weights`


def scale_of(cfg) -> float:
    """By which adapters are multiplied."""
    return (cfg.lora_alpha or cfg.lora) / cfg.lora


# ------------------------------------------------------------------------------------------- layers


class LoraLinear(nn.Linear):
    """A linear layer that is frozen, under its own names, and a trained change of it.

    copy: the merged weight [out, in], while it stands for both where no grad is asked for.
    """

    copy: Tensor | None = None

    def __init__(self, layer: nn.Linear, rank: int, scale: float):
        device = layer.weight.device
        super().__init__(layer.in_features, layer.out_features, device=device)
        self.weight = layer.weight
        self.bias = layer.bias
        self.scale = scale
        how = {"bias": False, "dtype": torch.float32, "device": device}
        self.lora_A = nn.Linear(layer.in_features, rank, **how)
        self.lora_B = nn.Linear(rank, layer.out_features, **how)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        if self.copy is not None and not torch.is_grad_enabled():
            return F.linear(x, self.copy, self.bias)
        rows = x.flatten(0, -2)
        down = rows @ self.lora_A.weight.to(x.dtype).t()  # [rows, rank]
        y = F.linear(rows, self.weight, self.bias)
        # In place: nothing asks for y itself again, and in bfloat16 the sum is rounded once.
        y.addmm_(down, self.lora_B.weight.to(x.dtype).t(), alpha=self.scale)
        return y.unflatten(0, x.shape[:-1])

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight of a plain layer that gives the same, float32."""
        return merge(self.weight, self.lora_B.weight, self.lora_A.weight, self.scale)


def merge(weight: Tensor, up: Tensor, down: Tensor, scale: float) -> Tensor:
    """weight [out, in] + scale * up [out, rank] down [rank, in]: float32, where the weight is."""
    change = up.to(weight.device) @ down.to(weight.device)
    return weight.float().add(change, alpha=scale)


def attach(model: WanDiT, rank: int, scale: float, targets: tuple[str, ...]) -> None:
    """Put adapters around the layers of the blocks whose names end so.

    ValueError for a target that is no linear layer's.
    """
    layers = {}
    for name, module in model.blocks.named_modules():
        if isinstance(module, nn.Linear):
            layers[name] = module
    for target in targets:
        if not any(_ends(name, target) for name in layers):
            known = ", ".join(sorted({name.partition(".")[2] for name in layers}))
            raise ValueError(f"lora_targets: {target!r} is no linear layer of a block; {known} are")
    for name, layer in layers.items():
        if any(_ends(name, target) for target in targets):
            model.blocks.set_submodule(name, LoraLinear(layer, rank, scale))


def _ends(name: str, target: str) -> bool:
    """As PEFT matches its target_modules, by whole words between dots.

    name: with its block's number, which does not count: one block's layers alone can't be chosen,
    since all blocks are taken to be alike.
    """
    own = name.partition(".")[2]
    return f".{own}".endswith(f".{target}")


def adapted(cfg, sizes: DiTConfig) -> WanDiT:
    """A network with adapters, on the meta device, of which these alone require grad."""
    with torch.device("meta"):
        model = WanDiT(sizes).to(getattr(torch, cfg.dtype)).requires_grad_(False)
    attach(model, cfg.lora, scale_of(cfg), cfg.lora_targets)
    return model


def of_a_block(cfg, sizes: DiTConfig) -> list[tuple[int, ...]]:
    """Shapes of the trained matrices of one block; all blocks are alike. Errors: see `attach`."""
    block = adapted(cfg, replace(sizes, num_layers=1))
    return [tuple(parameter.shape) for parameter in adapters(block).values()]


def adapters(model: WanDiT) -> dict[str, nn.Parameter]:
    """Its trained matrices by their names."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLinear):
            found[f"{name}.{DOWN}"] = layer.lora_A.weight
            found[f"{name}.{UP}"] = layer.lora_B.weight
    return found


def flop_share(model: WanDiT) -> float:
    """FLOP of the adapters' forward, as a share of the projections' that are done for each token.

    0 without adapters. The keys and values of the text, made once a text, are left out of both.
    """
    own = 0
    whole = 0
    for name, layer in model.blocks.named_modules():
        once = name.endswith(("cross_attn.k", "cross_attn.v"))
        if isinstance(layer, nn.Linear) and not once and ".lora_" not in name:
            whole += layer.in_features * layer.out_features
            if isinstance(layer, LoraLinear):
                own += layer.lora_A.out_features * (layer.in_features + layer.out_features)
    return own / whole


# ----------------------------------------------------------------------------------------- networks


def maker(network: Callable, cfg, world: fsdp.World, start: tuple[DiTConfig, dict]) -> Make:
    """What makes the networks of a run: network(cfg, world, ...) itself, or with lora `over_base`.

    network: train.network. start: sizes and tensors of `weights`.
    """
    if not cfg.lora:
        return partial(network, cfg, world)
    base, _ = network(cfg, world, "base", cfg.weights, *start)
    return partial(over_base, cfg, world, base)


def over_base(
    cfg, world: fsdp.World, base: WanDiT, who: str, path: str, sizes: DiTConfig, tensors: dict
) -> tuple[WanDiT, dict[str, Tensor]]:
    """A network over a base that is there already, and the adapters that it starts with.

    who: the "teacher" is the base itself; the "generator" goes on from lora_weights, the "critic"
    starts as the base is. path, tensors: the base has them.
    """
    if who == "teacher":
        return base, {}
    model = world.shard(adapted(cfg, sizes))

    # The parameters of the base take the places of those without memory.
    for name, parameter in base.named_parameters():
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, parameter)

    # Adapters get memory of their own.
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            layer.lora_A.to_empty(device=world.device)
            layer.lora_B.to_empty(device=world.device)
    initial = random_adapters(model, cfg.seed, who)
    if who == "generator" and cfg.lora_weights:
        initial |= read_adapters(cfg, sizes)
    for name, parameter in adapters(model).items():
        fsdp.copy_part(parameter.detach(), initial[name])

    model.checkpointing = cfg.checkpointing
    arrange(model, cfg.keep_attention, cfg.split_attention)
    return model, initial


def random_adapters(model: WanDiT, seed: int, who: str) -> dict[str, Tensor]:
    """What adapters start with: uniform A, as torch's layers start, and B = 0. On the CPU."""
    draws = rng("cpu", seed, "lora", who)
    made = {}
    for name, parameter in adapters(model).items():
        made[name] = torch.zeros(parameter.shape)
        if name.endswith(DOWN):
            bound = parameter.shape[1] ** -0.5
            made[name].uniform_(-bound, bound, generator=draws)
    return made


# -------------------------------------------------------------------------------------------- files


def read_adapters(cfg, sizes: DiTConfig) -> dict[str, Tensor]:
    """A and B of lora_weights, by their names here; an adapter of another alpha counts as it did.

    ValueError for another rank, for layers that have none here, for what is no plain LoRA, and for
    an adapter that a run has trained over another base.
    """
    file = cfg.lora_weights
    if of_another_base(file, cfg.weights):
        way_out = "name its base as weights, or merge it there (tools/convert.py --lora)"
        raise ValueError(f"{file} was trained over another base than {cfg.weights}: {way_out}")

    model = adapted(cfg, sizes)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    known = adapters(model)
    found = {}
    for name, (delta, *more) in read_lora(file, shapes).items():
        stem = name.removesuffix("weight")
        if f"{stem}{DOWN}" not in known or delta.down is None or more:
            way_out = "add it to lora_targets, or merge the file into weights (tools/convert.py)"
            raise ValueError(f"{file} changes {name}, which has no adapter here: {way_out}")
        rank = len(delta.down)
        if rank != cfg.lora:
            raise ValueError(f"{file} is of rank {rank}, lora = {cfg.lora}: give lora = {rank}")
        found[f"{stem}{DOWN}"] = delta.down.float()
        found[f"{stem}{UP}"] = delta.up.float() * (delta.scale / scale_of(cfg))
    bad = [name for name, value in found.items() if not finite(value)]
    if bad:
        raise ValueError(f"{file}: NaN or infinity in {bad[0]}; take an earlier checkpoint")
    return found


def check_files(cfg, sizes: DiTConfig) -> None:
    """Whether the adapter to start from is one for this run, and the layers are there.

    sizes: of the base. ValueError if not.
    """
    if cfg.lora:
        of_a_block(cfg, sizes)
    if cfg.lora_weights:
        read_adapters(cfg, sizes)


def said_by(file: str | Path) -> dict[str, Any]:
    """What an adapter of train.py, exported or in a checkpoint, says of its run; {} of others.

    Of other weights what `read_metadata` gives.
    """
    inside = Path(file, FILE)
    said = read_metadata(inside if inside.is_file() else file)
    return {key: value for key, value in said.items() if key != HEADER}


def of_another_base(file: str | Path, weights: str | Path) -> bool:
    """Whether an adapter says that it was trained over other weights than these."""
    base = said_by(file).get("data", {}).get("weights")
    return base not in (None, NOTHING) and base != digest(weights)


def note_base(file: str | Path, source: str | Path) -> None:
    """A line for the user if an adapter of train.py is put over other weights than it was trained
    over: over its own merged export, say, where it would count twice.
    """
    if of_another_base(file, source):
        text = f"{file} was trained over another base than {source}"
        effect = "over its own merged export it counts twice; its base in another layout is right"
        print(f"note: {text}: {effect}", file=sys.stderr)


def merged(run, final: Path, said: dict) -> tuple[WanDiT, Callable[[str], Tensor]]:
    """The model to export, and what gives its weights by name, float32 and whole.

    With lora the adapter is written first, alone, into a folder beside; then weights are those of
    the base with it merged. For every process to call, the result too, in the same order.
    run: runs.Run. final: the export's file. said: what it says of itself.
    """
    model = run.generator
    result = run.optimizers["generator"].result
    if not run.cfg.lora:
        return model, result
    write_adapter(run, adapter_folder(run.cfg, final.parent), said)

    def value(name: str) -> Tensor:
        owner, _, own = name.rpartition(".")
        layer = model.get_submodule(owner)
        weight = fsdp.whole(model.get_parameter(name).detach()).float()
        if not isinstance(layer, LoraLinear) or own != "weight":
            return weight
        up = result(f"{owner}.{UP}")
        down = result(f"{owner}.{DOWN}")
        return merge(weight, up, down, layer.scale)

    with torch.device("meta"):
        return WanDiT(model.cfg).to(run.dtype), value


def adapter_folder(cfg, out: Path) -> Path:
    """Where a run leaves its adapter."""
    return out / f"{cfg.stage}-lora"


def write_adapter(run, folder: Path, said: dict) -> None:
    """The generator's adapter as PEFT saves it, float32; for every process to call.

    Each file is the old or the whole new one. The header keeps alpha, for a file that is moved away
    from its config, and what the run says of itself, the digest of its base among it.
    """
    cfg = run.cfg
    result = run.optimizers["generator"].result
    tensors = {}
    for name in adapters(run.generator):
        value = result(name)
        if run.world.rank == 0:
            tensors[PREFIX + name] = value.to("cpu")
    if run.world.rank:
        return
    sizes = {"r": cfg.lora, "lora_alpha": cfg.lora_alpha or cfg.lora}
    header = {"format": "pt", HEADER: json.dumps(sizes)}
    for key, entry in {**said, "config": asdict(run.generator.cfg)}.items():
        header[key] = json.dumps(entry)
    write_json(folder / CONFIG, PLAIN | sizes | {"target_modules": list(cfg.lora_targets)})
    write_tensors(folder / FILE, tensors, header)


# ------------------------------------------------------------------------------------------- checks


def check(cfg) -> None:
    """What the config of a run says of LoRA by itself. ValueError for what does not go together."""
    if not cfg.lora:
        if cfg.lora_weights:
            raise ValueError("lora_weights needs lora: give the rank of its adapter")
        return
    if not cfg.lora_targets:
        raise ValueError("lora_targets is empty: name some layers, or give lora = 0")
    if not cfg.weights:
        raise ValueError("lora needs weights: the base that the adapters are trained over")

    # With one base there can be no other teacher.
    teacher = cfg.teacher
    there = teacher and Path(teacher).exists() and Path(cfg.weights).exists()
    if there and digest(teacher) != digest(cfg.weights):
        differ = f"teacher {teacher} and weights {cfg.weights} are different files"
        way_out = "name the teacher as weights, and the stage before as lora_weights"
        raise ValueError(f"with lora the base is the teacher, but {differ}: {way_out}")

"""Rollouts over merged weights: what runs without grad over many forwards goes without adapters.

For the time of a rollout, the block of `World.gathered`, the linear layers of a network with
adapters hold copies W + scale B A, and run as plain layers. Copies are made as each block first
runs, of the adapters as they are then, and go at the rollout's end: so they are never of other
weights, and a backward has their memory. What runs with grad runs with the adapters, replays of the
exit levels too; so do single forwards without grad, for which copies would cost more than they
save.

A copy is merged in float32 and rounded once, as the export is. So a rollout, and a sample video
too, is to the bit what a sampler makes of the exported weights (of the average, if the export is
of that). In bfloat16 that rounding is noise of up to 2^-9 of each weight, as every bfloat16 weight
has it, and a change of less than half an ulp is rounded away in a rollout, while a replay, which
adds the adapters' part to the result, sees it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from wan5b.dit import Block, DiTConfig, WanDiT
from wan5b.extras.adapters import LoraLinear, adapted
from wan5b.fsdp import World


def merge_rollouts(world: World, model: WanDiT) -> None:
    """In place: from now on the model's forwards without grad run merged inside of
    `world.gathered(model)`.

    The hooks come behind those of FSDP, so weights and adapters are gathered when they are copied.
    """
    model.merges = False
    for block in model.blocks:
        block.register_forward_pre_hook(partial(copy_weights, model, layers(block)))
    world.gathered = partial(merged, world.gathered, model)


@contextmanager
def merged(gathered: Callable, model: WanDiT, asked: WanDiT) -> Iterator[None]:
    """`World.gathered` of the network that is asked for; of this model with copies."""
    with gathered(asked):
        if asked is not model:
            yield
            return
        model.merges = True
        try:
            yield
        finally:
            model.merges = False
            for layer in layers(model):
                layer.copy = None


def copy_weights(model: WanDiT, found: list[LoraLinear], block: Block, args: tuple) -> None:
    """Before a block's forward: makes its copies, if it is a rollout's and they are not there.

    found: the block's `layers`; all blocks are alike.
    """
    if not runs_merged(model) or found[0].copy is not None:
        return
    for layer in found:
        layer.copy = layer.merged().to(layer.weight.dtype)


def layers(module: WanDiT | Block) -> list[LoraLinear]:
    """Its layers with adapters."""
    return [layer for layer in module.modules() if isinstance(layer, LoraLinear)]


def merges_rollouts(model: WanDiT) -> bool:
    """Whether it was given to `merge_rollouts`."""
    return hasattr(model, "merges")


def runs_merged(model: WanDiT) -> bool:
    """Whether its forwards have no adapters at the moment."""
    return merges_rollouts(model) and model.merges and not torch.is_grad_enabled()


def copied_bytes(cfg, sizes: DiTConfig) -> float:
    """Bytes that a rollout of a run takes for them, and to make the largest: it three times in
    float32. cfg: train.py's Config.
    """
    if not (cfg.lora and cfg.lora_merge):
        return 0
    block = adapted(cfg, replace(sizes, num_layers=1))
    numbers = [layer.weight.numel() for layer in layers(block)]
    held = sizes.num_layers * sum(numbers) * getattr(torch, cfg.dtype).itemsize
    return held + 3 * 4 * max(numbers)

"""A distillation's forwards without grad in float8: rollouts, and the scores of critic and teacher.

`without_grad_in_fp8(run)` gives the linear layers of the networks' blocks float8 copies of their
weights, which are there for a rollout, or for one forward, and then go: so they are never those of
other weights, and a backward has their memory. Forwards with grad, and so gradients in the weights,
stay in the run's dtype. Sample videos are rollouts too: they look as with sample.py's --fp8.

With LoRA a copy is of the base with the adapter merged, rounded as an export of it is when it is
read: so a rollout is what `--fp8` makes of that export. The forwards with grad round base and
adapter apart.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from wan5b.dit import Block, WanDiT
from wan5b.extras.adapters import LoraLinear
from wan5b.extras.fp8 import product, quantize
from wan5b.runs import Run


class Linear(nn.Linear):
    """One that takes its float8 copy, where there is one."""

    copy: tuple[Tensor, Tensor] | None = None  # float8 [R, C], scales [1, R]

    def forward(self, x: Tensor) -> Tensor:
        if self.copy is None:
            return super().forward(x)
        return product(x, *self.copy, self.bias)


class Adapted(Linear, LoraLinear):
    """A layer under an adapter: without a copy its forward is that of LoRA."""


class FeedForward(nn.Sequential):
    """Linear, GELU, Linear. In float8 gelu is not rounded in between."""

    def forward(self, x: Tensor) -> Tensor:
        first, _, second = self
        if second.copy is None:
            return super().forward(x)
        return product(first(x), *second.copy, second.bias, gelu=True)


def linear_layers(block: Block) -> list[Linear]:
    """Those of both attentions and of the feed-forward layer."""
    attentions = (block.self_attn, block.cross_attn)
    return [
        *(getattr(attention, name) for attention in attentions for name in "qkvo"),
        block.ffn[0],
        block.ffn[2],
    ]


def copy_weights(block: Block, args: tuple) -> None:
    """Before a block's forward: makes the copies if it has no grad and they are not there."""
    layers = linear_layers(block)
    if torch.is_grad_enabled() or layers[0].copy is not None:
        return
    for layer in layers:
        weight = layer.weight.detach()
        if isinstance(layer, Adapted):
            weight = layer.merged().to(weight.dtype)
        weight, scale = quantize(weight)
        layer.copy = weight, scale.T.contiguous()


def drop_copies(model: WanDiT) -> None:
    for block in model.blocks:
        for layer in linear_layers(block):
            layer.copy = None


def drop_after(model: WanDiT, args: tuple, v: Tensor) -> None:
    """Behind a forward, unless it is one of many with these weights."""
    if not model.keeps_copies:
        drop_copies(model)


@contextmanager
def keeping_copies(gathered: Callable, model: WanDiT) -> Iterator[None]:
    """`World.gathered` of a model whose copies stay as long as its parameters do."""
    with gathered(model):
        model.keeps_copies = True
        yield
        model.keeps_copies = False
        drop_copies(model)


def without_grad_in_fp8(run: Run) -> None:
    """In place. For GPUs that multiply in float8 (Hopper and later) and bfloat16 weights.

    Layers change their class and stay what they are, since FSDP knows them. Hooks are behind those
    of FSDP, so weights are gathered when they are copied.
    """
    for model in (run.generator, run.critic, run.teacher):
        model.keeps_copies = False
        for block in model.blocks:
            block.ffn.__class__ = FeedForward
            for layer in linear_layers(block):
                layer.__class__ = Adapted if isinstance(layer, LoraLinear) else Linear
            block.register_forward_pre_hook(copy_weights)
        model.register_forward_hook(drop_after)
    run.world.gathered = partial(keeping_copies, run.world.gathered)

"""AdamW over exact float32 masters, each process for its own shards of the weights.

A network holds its weights in the compute dtype. In bfloat16 they would not move at a learning rate
of 2e-6, for every step would be rounded away: what a step updates is a float32 master of each. A
float32 weight is its own master. A bfloat16 weight is the upper 16 bits of its master, of which the
optimizer keeps the lower 16 ("low"), so masters cost 2 bytes a weight and are exact.
"""

from collections.abc import Iterator, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from wan5b.fsdp import World, local, part_for, whole

Groups = dict[str, torch.dtype]
States = dict[str, dict[str, Tensor]]  # name of a weight -> group -> tensor of the weight's shape


def state_groups(dtype: torch.dtype, beta1: float, ema: bool) -> Groups:
    """The groups of state that a run keeps of weights of this dtype, and their own dtypes.

    Wide ones come first, so that all are aligned where they lie one behind the other.
    """
    groups = {"exp_avg_sq": torch.float32}  # average of squared gradients
    if beta1 > 0:
        groups["exp_avg"] = torch.float32  # average of gradients
    if ema:
        groups["ema"] = torch.float32  # average of masters
    if dtype != torch.float32:
        groups["low"] = torch.int16  # lower half of masters
    return groups


def join(high: Tensor, low: Tensor) -> Tensor:
    """The float32 that was `split`: bits = (bits of the bfloat16 << 16) + low. A new tensor."""
    return high.view(torch.int16).int().bitwise_left_shift_(16).add_(low).view(torch.float32)


def split(value: Tensor, high: Tensor, low: Tensor) -> None:
    """Write a float32 as its nearest bfloat16 (ties away from 0) and the int16 left over: exact."""
    bits = value.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    high.view(torch.int16).copy_(upper)
    low.copy_(bits - (upper << 16))


class Storage:
    """Where an optimizer keeps its state: here, on the device of the weights.

    Each optimizer has its own. extras/offload.py has one that keeps state in host memory.
    """

    def make(self, weights: dict[str, Tensor], groups: Groups) -> States:
        """State of zeros for all weights."""
        states = {}
        for name, weight in weights.items():
            states[name] = {g: torch.zeros_like(weight, dtype=dtype) for g, dtype in groups.items()}
        return states

    def stream(self, states: States) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Every weight's name and state in turn, on the device, to be changed in place."""
        yield from states.items()


class AdamW:
    """AdamW (arXiv 1711.05101) for all parameters of a model that require grad; no average of
    gradients if beta1 = 0.

    initial: name -> full tensor, the exact values that masters start from; the model has them in
    its own dtype. ema: keep a moving average of the masters. storage: where state is kept; default:
    on the device. Gradients are taken over from every backward and added up in float32 until `step`
    uses them.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        initial: Mapping[str, Tensor],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        *,
        ema: bool = False,
        storage: Storage | None = None,
    ):
        self.world = world
        self.lr = lr
        self.betas = betas
        self.weight_decay = weight_decay
        self.eps = 1e-8
        self.steps = 0
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.grads: dict[str, Tensor] = {}  # float32, of this process's shards

        self.storage = storage or Storage()
        weights = {name: local(parameter) for name, parameter in self.parameters.items()}
        dtypes = {weight.dtype for weight in weights.values()}
        assert len(dtypes) == 1, f"state is laid out for weights of one dtype, not {dtypes}"
        groups = state_groups(dtypes.pop(), betas[0], ema)
        self.state_of = self.storage.make(weights, groups)

        # Masters and averages start from the exact values; gradients are taken over from now on.
        for name, parameter in self.parameters.items():
            state = self.state_of[name]
            if "low" in state:
                exact = part_for(parameter, initial[name]).to(world.device, torch.float32)
                split(exact, weights[name], state["low"])
            if ema:
                state["ema"].copy_(self.master(name))
            parameter.register_post_accumulate_grad_hook(partial(self._take, name))

    def _take(self, name: str, parameter: Tensor) -> None:
        """After a backward: take the gradient over, so that none adds up in the compute dtype."""
        grad = local(parameter.grad)
        if name in self.grads:
            self.grads[name].add_(grad)  # in float32, with no copy before
        else:
            self.grads[name] = grad.float()
        parameter.grad = None

    def master(self, name: str) -> Tensor:
        """This process's part of a master, on the device: the weight itself, or a new tensor."""
        weight = local(self.parameters[name])
        state = self.state_of[name]
        return join(weight, state["low"].to(weight.device)) if "low" in state else weight

    @torch.no_grad()
    def step(self, scale: float, clip: float, ema_decay: float = 0.0) -> Tensor:
        """Multiply gradients by scale, clip their global norm, update. Returns the unclipped norm.

        The average, if kept, moves with ema_decay (0: becomes a copy). Gradients are forgotten. If
        their norm is not finite, nothing is updated.
        """
        missed = [name for name in self.parameters if name not in self.grads]
        assert not missed, f"no gradient reaches {missed[:3]} and {len(missed)} parameters in all"

        # 1. Gradients are averaged over copies of the weights, in an order that all processes have.
        self.world.average(self.grads[name] for name in self.parameters)

        # 2. The norm of all gradients. A process adds the squares of its own shards.
        norm = torch.stack([grad.square().sum() for grad in self.grads.values()]).sum()
        if self.world.mesh is not None:
            dist.all_reduce(norm, group=self.world.mesh.get_group("shard"))
        norm = norm.sqrt() * scale
        if not norm.isfinite():
            self.grads.clear()
            return norm

        # 3. What is the same for all weights: the gradients' factor, and corrections for averages
        # that started from zeros.
        self.steps += 1
        factor = scale * (clip / (norm + 1e-6)).clamp(max=1)
        beta1, beta2 = self.betas
        rate = self.lr / (1 - beta1**self.steps)
        correction = 1 - beta2**self.steps

        for name, state in self.storage.stream(self.state_of):
            weight = local(self.parameters[name])
            grad = self.grads.pop(name).mul_(factor)

            # 4. The averages of gradients and of their squares.
            square = state["exp_avg_sq"].lerp_(grad.square(), 1 - beta2)
            direction = state["exp_avg"].lerp_(grad, 1 - beta1) if beta1 else grad

            # 5. The master: decay, then the step. A float32 weight is updated in place.
            master = join(weight, state["low"]) if "low" in state else weight
            master.mul_(1 - self.lr * self.weight_decay)
            master.addcdiv_(direction, (square / correction).sqrt_().add_(self.eps), value=-rate)

            # 6. What follows the master: a bfloat16 weight, and the average.
            if "low" in state:
                split(master, weight, state["low"])
            if "ema" in state:
                state["ema"].lerp_(master, 1 - ema_decay)
        return norm

    def _sharded(self, name: str, part: Tensor) -> Tensor:
        """The DTensor of which `part` is this process's shard; `part` if nothing is sharded."""
        like = self.parameters[name]
        if not isinstance(like, DTensor):
            return part
        mesh = like.device_mesh
        if part.device.type != self.world.device.type:
            mesh = self.world.host_mesh  # a DTensor lies on its mesh's device
        size = {"shape": like.shape, "stride": like.stride()}
        return DTensor.from_local(part, mesh, like.placements, **size)

    def result(self, name: str) -> Tensor:
        """A float32 weight, whole: its average, if kept, else its master.

        For every process to call, after `state`, which waits for what `step` still copies.
        """
        state = self.state_of[name]
        part = state["ema"] if "ema" in state else self.master(name)
        return whole(self._sharded(name, part))

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, "group.name" -> tensor, to be saved or to be read into.

        In place of "low" it has masters, so that a run of another dtype, or any reader, can go on
        from it. Those of bfloat16 weights are new tensors in host memory, 4 bytes a weight while
        the caller holds them; all else is the optimizer's own memory.
        """
        # The last step's results may still be on their way into host memory.
        torch.get_device_module(self.world.device).synchronize()
        saved = {}
        for name, state in self.state_of.items():
            parts = {"master": self.master(name), **state}
            if "low" in parts:
                del parts["low"]
                parts["master"] = parts["master"].cpu()
            for group, part in parts.items():
                saved[f"{group}.{name}"] = self._sharded(name, part)
        return saved

    @torch.no_grad()
    def loaded(self, saved: dict[str, Tensor], steps: int) -> None:
        """After what `state` returned has been read into: weights follow their masters."""
        self.steps = steps
        for name, state in self.state_of.items():
            if "low" in state:
                master = local(saved[f"master.{name}"]).to(self.world.device)
                split(master, local(self.parameters[name]), state["low"])

"""Everything that knows of more than one process: start, sharding, the optimizer's sharded state, checkpoints.

Models hold weights in the compute dtype; the optimizer holds float32 masters, moments and gradients of local shards.
A single process takes the same path without a process group and without wrapping.
"""

import json
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

# A single process saves as such on purpose.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class World:
    """The processes of a run, from torchrun's environment; one process without it.

    shard: how many processes share one copy of the weights (FSDP; default: those of a node), each group holding a
    replica of the others' (HSDP) where there are several.
    """

    def __init__(self, device: str, shard: int = 0):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank, local_size = (int(os.environ.get(k, d)) for k, d in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
        self.device = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
        self.mesh = self.shard_group = None
        self.stopping = False
        if self.size > 1:
            shard = shard or local_size
            if self.size % shard:
                raise ValueError(f"{self.size} processes do not divide into groups of {shard}")
            if device == "cuda":
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
            mesh = init_device_mesh(device, (self.size // shard, shard), mesh_dim_names=("replicate", "shard"))
            self.mesh = mesh["shard"] if shard == self.size else mesh
            self.shard_group = self.mesh.get_group("shard")
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stopping", True))

    def close(self) -> None:
        if self.mesh is not None:
            dist.destroy_process_group()

    def shard(self, model: nn.Module) -> nn.Module:
        """Shard a model that still lies on the meta device, block by block, then the rest; then give it memory."""
        if self.mesh is not None:
            policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
            for module in (*model.blocks, model):
                fully_shard(module, mesh=self.mesh, mp_policy=policy, reshard_after_forward=True)
        return model.to_empty(device=self.device)

    @contextmanager
    def gathered(self, model: nn.Module) -> Iterator[None]:
        """Keep the parameters of a sharded model gathered over many forwards without grad (a rollout)."""
        if self.mesh is not None:
            model.set_reshard_after_forward(False)
        yield
        if self.mesh is not None:
            model.set_reshard_after_forward(True)
            for module in (*model.blocks, model):
                module.reshard()

    def share(self, count: int) -> range:
        """This process's part of `count` items of a global batch."""
        if count % self.size:
            raise ValueError(f"the global batch {count} does not divide over {self.size} processes")
        part = count // self.size
        return range(self.rank * part, (self.rank + 1) * part)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over processes."""
        values = values.detach().to(self.device, torch.float32, copy=True)
        if self.mesh is not None:
            dist.all_reduce(values)
        return values / self.size

    def stop_requested(self) -> bool:
        """Whether any process has got SIGTERM: the same answer everywhere."""
        return bool(self.mean(torch.tensor(float(self.stopping))) > 0)

    def barrier(self) -> None:
        if self.mesh is not None:
            dist.barrier()


def local(tensor: Tensor) -> Tensor:
    """The part of a (possibly sharded) tensor that this process holds; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, gathered: every process must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_for(parameter: Tensor, full: Tensor) -> Tensor:
    """The rows of the full tensor that belong to this process's shard of the parameter (FSDP2 splits axis 0)."""
    if not isinstance(parameter, DTensor):
        return full
    mesh = parameter.device_mesh
    chunks = full.chunk(mesh.size(-1))
    index = mesh.get_local_rank("shard")
    return chunks[index] if index < len(chunks) else full[:0]


def copy_part(parameter: Tensor, full: Tensor) -> None:
    """Fill this process's shard of the parameter from the full tensor, with cast and move."""
    local(parameter).copy_(part_for(parameter, full))


class AdamW:
    """AdamW (arXiv 1711.05101) over float32 masters of the local shards; no first moment where beta1 = 0.

    A float32 parameter is its own master; others' masters come from `initial` (name -> full tensor). Gradients are
    taken over from every backward, in float32, into accumulators that `step` consumes, so the networks' low-precision
    ones never add up. ema: keep a float32 moving average of the masters.
    """

    def __init__(
        self, model: nn.Module, world: World, initial: Mapping[str, Tensor], lr, betas, weight_decay, ema=False
    ):
        self.world, self.lr, self.betas, self.weight_decay = world, lr, betas, weight_decay
        self.steps, self.eps = 0, 1e-8
        self.parameters = dict(model.named_parameters())
        self.grads: dict[str, Tensor] = {}
        self.master, self.first, self.second, self.ema = {}, {}, {}, {}
        for name, parameter in self.parameters.items():
            mine = local(parameter.detach())
            if mine.dtype == torch.float32:
                self.master[name] = mine
            else:  # from the source, not from the rounded parameter
                self.master[name] = part_for(parameter, initial[name]).to(mine.device, torch.float32, copy=True)
            self.second[name] = torch.zeros_like(self.master[name])
            if betas[0]:
                self.first[name] = torch.zeros_like(self.master[name])
            if ema:
                self.ema[name] = self.master[name].clone()
            parameter.register_post_accumulate_grad_hook(self._take(name))

    def _take(self, name: str) -> Callable:
        def hook(parameter: Tensor) -> None:
            grad = local(parameter.grad).float()
            self.grads[name] = self.grads[name].add_(grad) if name in self.grads else grad
            parameter.grad = None

        return hook

    def missing(self) -> list[str]:
        """Parameters that no backward has reached since the last step."""
        return [name for name in self.parameters if name not in self.grads]

    @torch.no_grad()
    def step(self, scale: float, clip: float, ema_decay: float = 0.0) -> Tensor:
        """Multiply the gradients by scale, clip their global norm, update, forget them. Returns the norm, unclipped.

        The average, if kept, moves with ema_decay (0: a copy). A norm that is not finite updates nothing.
        """
        norm = torch.stack([grad.square().sum() for grad in self.grads.values()]).sum()
        if self.world.shard_group is not None:
            dist.all_reduce(norm, group=self.world.shard_group)
        norm = norm.sqrt() * scale
        if not norm.isfinite():
            self.grads.clear()
            return norm
        scale = scale * (clip / (norm + 1e-6)).clamp(max=1)
        self.steps += 1
        beta1, beta2 = self.betas
        correction1, correction2 = 1 - beta1**self.steps, 1 - beta2**self.steps
        for name, parameter in self.parameters.items():
            master, grad, second = self.master[name], self.grads.pop(name).mul_(scale), self.second[name]
            second.lerp_(grad.square(), 1 - beta2)
            direction = grad
            if beta1:
                direction = self.first[name].lerp_(grad, 1 - beta1)
            master.mul_(1 - self.lr * self.weight_decay)
            denominator = (second / correction2).sqrt_().add_(self.eps)
            master.addcdiv_(direction, denominator, value=-self.lr / correction1)
            mine = local(parameter.detach())
            if mine.dtype != torch.float32:
                mine.copy_(master)
            if self.ema:
                self.ema[name].lerp_(master, 1 - ema_decay)
        return norm

    @contextmanager
    @torch.no_grad()
    def averaged(self) -> Iterator[None]:
        """The model with the moving average in place of its weights, if one is kept."""
        weights = {name: local(self.parameters[name].detach()).clone() for name in self.ema}
        for name, value in self.ema.items():
            local(self.parameters[name].detach()).copy_(value)
        yield
        for name, value in weights.items():
            local(self.parameters[name].detach()).copy_(value)

    def sharded(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Local shards as what they are parts of: DTensors for sharded parameters."""

        def wrap(parameter, value):
            if not isinstance(parameter, DTensor):
                return value
            where = (parameter.device_mesh, parameter.placements)
            return DTensor.from_local(value, *where, shape=parameter.shape, stride=parameter.stride())

        return {name: wrap(self.parameters[name], value) for name, value in values.items()}

    def state(self) -> dict[str, Tensor]:
        """Everything to be saved, by name; the tensors share memory with the optimizer's."""
        groups = {"master": self.master, "first": self.first, "second": self.second, "ema": self.ema}
        return {f"{group}.{k}": v for group, values in groups.items() for k, v in self.sharded(values).items()}

    @torch.no_grad()
    def loaded(self, steps: int) -> None:
        """To be called after `state` has been read into: the parameters follow their masters."""
        self.steps = steps
        for name, parameter in self.parameters.items():
            local(parameter.detach()).copy_(self.master[name])


def save(world: World, folder: Path, optimizers: dict[str, AdamW], facts: dict, keep: int = 2) -> Path:
    """Write a checkpoint folder/step-N of all optimizers and facts (with "step"); atomic: beside, then renamed.

    The `keep` newest complete ones stay. Any world size can read it back.
    """
    path = folder / f"step-{facts['step']:07d}"
    partial = path.with_suffix(".partial")
    state = {f"{who}.{k}": v for who, optimizer in optimizers.items() for k, v in optimizer.state().items()}
    if world.rank == 0:
        for unfinished in folder.glob("step-*.partial"):
            shutil.rmtree(unfinished)
    world.barrier()
    dcp.save(state, checkpoint_id=partial, no_dist=world.mesh is None)
    if world.rank == 0:
        steps = {who: optimizer.steps for who, optimizer in optimizers.items()}
        (partial / "facts.json").write_text(json.dumps(facts | {"optimizer_steps": steps}, indent=2))
        if path.exists():
            shutil.rmtree(path)
        os.replace(partial, path)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    world.barrier()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".partial")


def load(world: World, path: Path, optimizers: dict[str, AdamW]) -> dict:
    """Read a checkpoint into the optimizers and their models, resharding as needed; returns its facts."""
    facts = json.loads((path / "facts.json").read_text())
    state = {f"{who}.{k}": v for who, optimizer in optimizers.items() for k, v in optimizer.state().items()}
    dcp.load(state, checkpoint_id=path, no_dist=world.mesh is None)
    for who, optimizer in optimizers.items():
        optimizer.loaded(facts["optimizer_steps"][who])
    return facts

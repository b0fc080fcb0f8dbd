"""Everything that knows of more than one process: start, sharding, the optimizer's sharded state, checkpoints.

Models hold weights in the compute dtype; the optimizer holds what makes float32 masters of them, moments and gradients
of local shards, on the device or in host memory. A single process takes the same path without a process group and
without wrapping.
"""

import json
import os
import pickle
import shutil
import signal
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

MEMINFO = Path("/proc/meminfo")
# The optimizer's state of a weight, by group; wide types first, so that in one buffer all are aligned.
GROUPS = {"second": torch.float32, "first": torch.float32, "ema": torch.float32, "low": torch.int16}
# A single process saves as such on purpose.
warnings.filterwarnings(
    "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
)


class World:
    """The processes of a run, from torchrun's environment; one process without it.

    shard: how many processes share one copy of the weights (FSDP; default: those of a node), each group holding a
    replica of the others' (HSDP) where there are several.
    """

    def __init__(self, device: str, shard: int = 0):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank, self.local_size = (
            int(os.environ.get("LOCAL_RANK", 0)),
            int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        )
        self.device = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
        self.mesh, self.host_mesh, self.shards, self.stopping = None, None, 1, False
        if self.size > 1:
            self.shards = shard = shard or self.local_size
            if self.size % shard:
                raise ValueError(f"{self.size} processes do not divide into groups of {shard}")
            if device == "cuda":
                torch.cuda.set_device(self.device)
            dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
            shape, axes = (self.size // shard, shard), ("replicate", "shard")
            # a DTensor lies on its mesh's device
            meshes = [
                init_device_mesh(kind, shape, mesh_dim_names=axes) for kind in (device, "cpu")
            ]
            self.mesh, self.host_mesh = (
                mesh["shard"] if shard == self.size else mesh for mesh in meshes
            )
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stopping", True))

    def free(self) -> dict[str, float]:
        """Bytes that this process may still take: on the device, and its share of the host's available memory."""
        host = float("inf")  # where the system doesn't say
        if MEMINFO.exists():
            host = (
                1024
                * int(MEMINFO.read_text().partition("MemAvailable:")[2].split()[0])
                / self.local_size
            )
        return {
            "device": torch.cuda.mem_get_info()[0] if self.device.type == "cuda" else host,
            "host": host,
        }

    def close(self) -> None:
        if self.mesh is not None:
            dist.destroy_process_group()
            time.sleep(
                0.2
            )  # gloo's threads need the interpreter to drop their last works, and abort if it is gone

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

    def mean(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Means of scalars over processes, which must name them in the same order."""
        mine = torch.stack([value.detach().float() for value in values.values()])
        if self.mesh is not None:
            dist.all_reduce(mine)
        return dict(zip(values, (mine / self.size).tolist(), strict=True))

    def stops(self) -> bool:
        """Whether any process has got SIGTERM: the same answer everywhere. The host alone is asked, and waits."""
        return self.mean({"stopping": torch.tensor(float(self.stopping))})["stopping"] > 0

    def barrier(self) -> None:
        if self.mesh is not None:
            dist.barrier()


def local(tensor: Tensor) -> Tensor:
    """The part of a (possibly sharded) tensor that this process holds; shares its memory, carries no grad."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def part_for(parameter: Tensor, full: Tensor) -> Tensor:
    """The rows of the full tensor that belong to this process's shard of the parameter (FSDP2 splits axis 0)."""
    if not isinstance(parameter, DTensor):
        return full
    mesh = parameter.device_mesh
    rows = -(
        -len(full) // mesh.size(-1)
    )  # of all shards but the last ones, which may have fewer or none
    return full[mesh.get_local_rank("shard") * rows :][:rows]


def copy_part(parameter: Tensor, full: Tensor) -> None:
    """Fill this process's shard of the parameter from the full tensor, with cast and move."""
    local(parameter).copy_(part_for(parameter, full))


def join(high: Tensor, low: Tensor) -> Tensor:
    """The float32 that was `split`: bits = (bits of the bfloat16 << 16) + low. A new tensor."""
    return high.view(torch.int16).int().bitwise_left_shift_(16).add_(low).view(torch.float32)


def split(value: Tensor, high: Tensor, low: Tensor) -> None:
    """A float32 as its bfloat16, rounded to nearest (ties away from 0), and the bits that are left, in int16: exact."""
    bits = value.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    high.view(torch.int16).copy_(upper)
    low.copy_(bits - (upper << 16))


def placed(
    dtype: torch.dtype, beta1: float, ema: bool, offload: bool, device: torch.device
) -> tuple[list, list]:
    """The groups of state kept for weights of this dtype: (on the device, in page-locked memory of its host).

    The average is touched by the optimizer's step alone, so it never takes the memory of a GPU.
    """
    kept = {"second": True, "first": beta1 > 0, "ema": ema, "low": dtype != torch.float32}
    hosted = {
        group: offload or (group == "ema" and device.type == "cuda")
        for group in GROUPS
        if kept[group]
    }
    return [group for group in hosted if not hosted[group]], [
        group for group in hosted if hosted[group]
    ]


def host_memory(size: int, device: torch.device) -> Tensor:
    """Zeroed bytes in host memory, page-locked for a GPU, until the tensor goes.

    Registered as one piece, since torch's own pinned memory comes in powers of two.
    """
    memory = torch.zeros(
        size, dtype=torch.uint8
    )  # by all threads, so the pages are there to be locked
    if size and device.type == "cuda":
        runtime = torch.cuda.cudart()
        torch.cuda.check_error(runtime.cudaHostRegister(memory.data_ptr(), size, 0))
        weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr()).atexit = False
    return memory


def carve(memory: Tensor, shape: torch.Size, groups: list[str]) -> dict[str, Tensor]:
    """Bytes as one tensor of this shape for each group, one behind the other."""
    sizes = [shape.numel() * GROUPS[group].itemsize for group in groups]
    parts = zip(groups, memory[: sum(sizes)].split(sizes), strict=True)
    return {group: part.view(GROUPS[group]).view(shape) for group, part in parts}


class AdamW:
    """AdamW (arXiv 1711.05101) over float32 masters of the local shards; no first moment where beta1 = 0.

    A float32 parameter is its own master. A bfloat16 one is the upper half of its master, of which the state holds the
    lower ("low"), so that masters cost 2 bytes and are exact; they start from `initial` (name -> full tensor).
    Gradients are taken over from every backward, in float32, into accumulators that `step` consumes, so the networks'
    low-precision ones never add up. ema: keep a float32 moving average of the masters. offload: keep all state in host
    memory, through which `step` streams.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        initial,
        lr,
        betas,
        weight_decay,
        offload=False,
        ema=False,
    ):
        self.world, self.lr, self.betas, self.weight_decay = world, lr, betas, weight_decay
        self.steps, self.eps = 0, 1e-8
        self.parameters = dict(model.named_parameters())
        self.grads: dict[str, Tensor] = {}
        resident, self.hosted = placed(
            next(model.parameters()).dtype, betas[0], ema, offload, world.device
        )
        width = sum(GROUPS[group].itemsize for group in self.hosted)
        sizes = [-(-width * local(p).numel() // 64) * 64 for p in self.parameters.values()]
        self.host = host_memory(sum(sizes), world.device)
        self.segments = dict(zip(self.parameters, self.host.split(sizes), strict=True))
        self.held: dict[str, dict[str, Tensor]] = {}  # name -> group -> state, where it is kept
        for name, parameter in self.parameters.items():
            mine = local(parameter)
            held = {group: torch.zeros_like(mine, dtype=GROUPS[group]) for group in resident}
            self.held[name] = held | carve(self.segments[name], mine.shape, self.hosted)
            if mine.dtype != torch.float32:  # from the source, not from the rounded parameter
                split(
                    part_for(parameter, initial[name]).to(mine.device, torch.float32),
                    mine,
                    self.held[name]["low"],
                )
            if ema:
                self.held[name]["ema"].copy_(self.master(name))
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: self._take(name, p))

    def _take(self, name: str, parameter: Tensor) -> None:
        """After a backward: its gradient, added up."""
        grad = local(parameter.grad).float()
        self.grads[name] = self.grads[name].add_(grad) if name in self.grads else grad
        parameter.grad = None

    def master(self, name: str) -> Tensor:
        """This process's part of a float32 master, on the device: the parameter itself or a new tensor."""
        mine, held = local(self.parameters[name]), self.held[name]
        return join(mine, held["low"].to(mine.device)) if "low" in held else mine

    def _streamed(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Every parameter's name and state in turn, on the device, to be changed in place.

        State in host memory passes through three device buffers: one parameter's is copied in while the one before is
        computed with and the one before that copied out, each on a stream of its own, in an order kept by events, for
        which the host does not wait. On a CPU the same copies run one after the other.
        """
        device = torch.get_device_module(self.world.device)
        here, inward, outward = device.current_stream(), device.Stream(), device.Stream()
        buffers = torch.empty(
            3, max(map(len, self.segments.values())), dtype=torch.uint8, device=self.world.device
        )
        free = [here.record_event()] * 3  # behind whatever had the buffers' memory before
        for turn, (name, held) in enumerate(self.held.items()):
            slot, segment = turn % 3, self.segments[name]
            buffer = buffers[slot, : len(segment)]
            inward.wait_event(free[slot])
            with device.stream(inward):
                buffer.copy_(segment, non_blocking=True)
            here.wait_stream(inward)
            yield name, held | carve(buffer, held["second"].shape, self.hosted)
            outward.wait_stream(here)
            with device.stream(outward):
                segment.copy_(buffer, non_blocking=True)
            free[slot] = outward.record_event()
        here.wait_stream(outward)  # so the buffers can go

    @torch.no_grad()
    def step(self, scale: float, clip: float, ema_decay: float = 0.0) -> Tensor:
        """Multiply the gradients by scale, clip their global norm, update, forget them. Returns the norm, unclipped.

        The average, if kept, moves with ema_decay (0: a copy). A norm that is not finite updates nothing.
        """
        unreached = [name for name in self.parameters if name not in self.grads]
        assert not unreached, (
            f"no gradient reaches {unreached[:3]} and {len(unreached)} parameters in all"
        )
        norm = torch.stack([grad.square().sum() for grad in self.grads.values()]).sum()
        if self.world.mesh is not None:
            dist.all_reduce(norm, group=self.world.mesh.get_group("shard"))
        norm = norm.sqrt() * scale
        if not norm.isfinite():
            self.grads.clear()
            return norm
        scale = scale * (clip / (norm + 1e-6)).clamp(max=1)
        self.steps += 1
        beta1, beta2 = self.betas
        correction1, correction2 = 1 - beta1**self.steps, 1 - beta2**self.steps
        for name, held in self._streamed():
            mine, grad, second = (
                local(self.parameters[name]),
                self.grads.pop(name).mul_(scale),
                held["second"],
            )
            master = join(mine, held["low"]) if "low" in held else mine
            second.lerp_(grad.square(), 1 - beta2)
            direction = held["first"].lerp_(grad, 1 - beta1) if beta1 else grad
            master.mul_(1 - self.lr * self.weight_decay)
            master.addcdiv_(
                direction,
                (second / correction2).sqrt_().add_(self.eps),
                value=-self.lr / correction1,
            )
            if "low" in held:
                split(master, mine, held["low"])
            if "ema" in held:
                held["ema"].lerp_(master, 1 - ema_decay)
        return norm

    @contextmanager
    @torch.no_grad()
    def averaged(self) -> Iterator[None]:
        """The model with the moving average in place of its weights, if one is kept."""
        weights = {
            name: local(self.parameters[name]).clone()
            for name, held in self.held.items()
            if "ema" in held
        }
        for name in weights:
            local(self.parameters[name]).copy_(self.held[name]["ema"])
        yield
        for name, value in weights.items():
            local(self.parameters[name]).copy_(value)

    def _sharded(self, name: str, value: Tensor) -> Tensor:
        """A local shard as what it is a part of: a DTensor if the parameter is sharded."""
        parameter = self.parameters[name]
        if not isinstance(parameter, DTensor):
            return value
        mesh = (
            parameter.device_mesh
            if value.device.type == self.world.device.type
            else self.world.host_mesh
        )
        return DTensor.from_local(
            value, mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        )

    def result(self, name: str) -> Tensor:
        """A float32 weight, whole: its average, if kept, else its master. For every process to call, after `state`."""
        held = self.held[name]
        value = self._sharded(name, held["ema"] if "ema" in held else self.master(name))
        return value.full_tensor() if isinstance(value, DTensor) else value

    def state(self) -> dict[str, Tensor]:
        """Everything to be saved, by name. The tensors share memory with the optimizer's, but for masters of bfloat16
        parameters: those are joined in host memory, 4 bytes a weight while the caller holds them. So checkpoints hold
        float32 masters, whatever the dtype and place of a run, for any run or reader to go on from.
        """
        torch.get_device_module(
            self.world.device
        ).synchronize()  # the host reads what `step` copied
        state = {}
        for name, held in self.held.items():
            held = held | {
                "master": self.master(name).to("cpu" if "low" in held else self.world.device)
            }
            state |= {
                f"{group}.{name}": self._sharded(name, held[group])
                for group in held
                if group != "low"
            }
        return state

    @torch.no_grad()
    def loaded(self, state: dict[str, Tensor], steps: int) -> None:
        """To be called after `state` has been read into: the parameters follow their masters."""
        self.steps = steps
        for name, held in self.held.items():
            if "low" in held:
                split(
                    local(state[f"master.{name}"]).to(self.world.device),
                    local(self.parameters[name]),
                    held["low"],
                )


def save(
    world: World, folder: Path, optimizers: dict[str, AdamW], facts: dict, keep: int = 2
) -> Path:
    """Write a checkpoint folder/step-N of all optimizers and facts (with "step"); atomic: beside, then renamed.

    The `keep` newest complete ones stay. Any world size can read it back.
    """
    path = folder / f"step-{facts['step']:07d}"
    partial = path.with_suffix(".partial")
    state = {
        who: optimizer.state() for who, optimizer in optimizers.items()
    }  # flattened to who.group.name
    if world.rank == 0:
        for unfinished in folder.glob("step-*.partial"):
            shutil.rmtree(unfinished)
    world.barrier()
    dcp.save(state, checkpoint_id=partial, no_dist=world.mesh is None)
    if world.rank == 0:
        steps = {who: optimizer.steps for who, optimizer in optimizers.items()}
        (partial / "facts.json").write_text(
            json.dumps(facts | {"optimizer_steps": steps}, indent=2)
        )
        os.replace(partial, path)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    world.barrier()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".partial")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The generator's average in a checkpoint, if kept, else its masters: float32, whole, for this process alone.

    Needs no other process, and memory for all that it returns. torch opens the checkpoint's index as a pickle, so read
    only what comes from people you trust. ValueError if the checkpoint is damaged.
    """
    try:
        entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        averaged = any(key.startswith("generator.ema.") for key in entries)
        prefix = "generator.ema." if averaged else "generator.master."
        state = {key: torch.empty(entries[key].size) for key in entries if key.startswith(prefix)}
        dcp.load(state, checkpoint_id=path, no_dist=True)
    except (
        OSError,
        EOFError,
        AttributeError,
        pickle.UnpicklingError,
        dcp.CheckpointException,
    ) as error:
        cause = "".join(
            str(error).splitlines()[-1:]
        )  # the rest of a CheckpointException's is a traceback
        raise ValueError(
            f"{path} is damaged or incomplete; take another checkpoint: {cause}"
        ) from error
    return {key.removeprefix(prefix): value for key, value in state.items()}


def load(world: World, path: Path, optimizers: dict[str, AdamW]) -> dict:
    """Read a checkpoint into the optimizers and their models, resharding as needed; returns its facts."""
    facts = json.loads((path / "facts.json").read_text())
    state = {who: optimizer.state() for who, optimizer in optimizers.items()}
    dcp.load(state, checkpoint_id=path, no_dist=world.mesh is None)
    for who, optimizer in optimizers.items():
        optimizer.loaded(state[who], facts["optimizer_steps"][who])
    return facts

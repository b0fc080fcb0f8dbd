"""What the tests share: the reference's vectors, models built from them, relative error, where
tests run.
"""

import json
import signal
from contextlib import contextmanager
from dataclasses import fields
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from wan5b import fuse
from wan5b.dit import DiTConfig, WanDiT
from wan5b.kvcache import KVCache

GOLDEN = Path(__file__).parent / "golden"

# A job in the background ignores SIGINT, and so would the programs that tests start and stop.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@lru_cache
def golden(name: str) -> tuple[dict, dict]:
    """Tensors and config of a file of vectors."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as f:
        return {key: f.get_tensor(key) for key in f.keys()}, json.loads(f.metadata()["config"])


def golden_dit(name: str, device="cpu", dtype=torch.float32) -> WanDiT:
    """The model that made the vectors, with its weights."""
    tensors, config = golden(name)
    if "weights" in config:
        tensors, _ = golden(config["weights"])
    known = {field.name for field in fields(DiTConfig)}
    model = WanDiT(DiTConfig(**{key: value for key, value in config.items() if key in known}))
    model.load_state_dict(
        {key[2:]: value for key, value in tensors.items() if key.startswith("w.")}
    )
    return model.to(device, dtype)


def new_cache(model: WanDiT, frames: int, batch: int = 1, **options) -> KVCache:
    """A cache for latents of 4 x 6 pixels, where the model is. It holds NaN, as new memory may:
    none may be read.
    """
    weight = model.head.head.weight
    cache = KVCache(
        model.cfg, batch, frames, 6, device=weight.device, dtype=weight.dtype, **options
    )
    cache.memory.fill_(torch.nan)
    cache.text.fill_(torch.nan)
    return cache


def rel(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||, in float64 on the CPU."""
    a, b = (x.detach().cpu().double() for x in (a, b))
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    return ((a - b).norm() / b.norm()).item()


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def private_memory() -> int:
    """Bytes of this process that belong to no file."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))


def frames_first(x: torch.Tensor) -> torch.Tensor:
    """[B, T, C, H, W] of the rollout and loss vectors <-> [B, C, T, H, W]."""
    return x.transpose(1, 2)


@contextmanager
def compiling():
    """fuse.py may be switched on inside; afterwards it is off, and the compiler's limits are what
    they were.
    """
    config, limits = torch._dynamo.config, ("recompile_limit", "fail_on_recompile_limit_hit")
    before = {name: getattr(config, name) for name in limits}
    try:
        yield
    finally:
        fuse.enable(False)
        for name, value in before.items():
            setattr(config, name, value)


def gpu(test):
    """Mark a test that needs CUDA: runs with -m gpu, skips without a device."""
    return pytest.mark.gpu(NO_CUDA(test))


NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
ON_GPU = [pytest.mark.gpu, NO_CUDA]
# device, dtype and the bar that a test against float32 vectors has there
PLACES = [
    pytest.param("cpu", torch.float32, 1e-4, id="cpu"),
    pytest.param("cpu", torch.bfloat16, 3e-2, id="cpu-bf16"),
    pytest.param("cuda", torch.float32, 1e-4, id="cuda", marks=ON_GPU),
    pytest.param("cuda", torch.bfloat16, 3e-2, id="cuda-bf16", marks=ON_GPU),
]

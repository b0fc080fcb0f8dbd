"""Tensors that are made as they are copied: scaled float8 weights, and whatever lora.py merges.

A float8 weight of 3072 x 14336 elements is 176 MB in float32, and `weights.fill` copies several
weights at once. So a `Made` tensor is never there as a whole: it is copied block by block of rows.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from wan5b.util import first_line, raise_interrupted

BLOCK = 1 << 21  # elements made at a time by each thread: 8 MB in float32

FORMATS = ("float8_e4m3fn", "float8_e5m2")
SCALES = (".scale_weight", ".weight_scale")  # ComfyUI's old and new name
UNUSED = (".scale_input", ".input_scale", ".comfy_quant")  # scales of activations, descriptions
HEADER = "_quantization_metadata"


class Made:
    """Stands where a mapped tensor would, in float32: `parameter.copy_(made)` makes and copies it.

    shape: the whole tensor's, at least one axis. rows(start, stop): those rows of it, float32.
    like: what it is made from, whose `file` it has if there is one.
    made[start:stop] is a part of it, not made yet either.
    """

    def __init__(self, shape: torch.Size, rows: Callable[[int, int], Tensor], like=None):
        self.shape = shape
        self.dtype = torch.float32
        self.rows = rows
        if hasattr(like, "file"):
            self.file = like.file  # which errors name

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice) -> "Made":
        start, stop, step = part.indices(self.shape[0])
        assert step == 1, f"rows {part}"
        shape = torch.Size((max(stop - start, 0), *self.shape[1:]))
        return Made(shape, lambda a, b: self.rows(start + a, start + b))

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """What torch does when a Made is among the arguments of its functions: copy_ only."""
        if function is not Tensor.copy_ or len(args) != 2 or not isinstance(args[1], cls):
            return NotImplemented
        target, made = args
        made.copy_to(target)
        return target

    def copy_to(self, target: Tensor) -> None:
        """Fill the target, of the same shape, block by block; casts and moves on the way."""
        assert target.shape == self.shape, f"{target.shape} from {self.shape}"
        step = max(BLOCK // max(math.prod(self.shape[1:]), 1), 1)
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            target[start:stop].copy_(self.rows(start, stop))

    def tensor(self) -> Tensor:
        """The whole of it, float32, on the CPU."""
        whole = torch.empty(self.shape)
        self.copy_to(whole)
        return whole


def float_rows(tensor: Tensor | Made, start: int, stop: int) -> Tensor:
    """Rows of a tensor of either kind as a new float32 tensor, which may be written to."""
    if isinstance(tensor, Made):
        return tensor.rows(start, stop)
    return tensor[start:stop].to(torch.float32, copy=True)


def equal(a: Tensor | Made, b: Tensor | Made) -> bool:
    """Whether two tensors hold the same values, compared block by block."""
    if a.shape != b.shape:
        return False
    step = max(BLOCK // max(math.prod(a.shape[1:]), 1), 1)
    for start in range(0, len(a), step):
        stop = min(start + step, len(a))
        if not torch.equal(float_rows(a, start, stop), float_rows(b, start, stop)):
            return False
    return True


def _scaled(weight: Tensor, scale: Tensor) -> Made:
    """weight * scale, in float32. scale: one value, or one for each row."""
    scale = scale.float().reshape(-1)

    def rows(start: int, stop: int) -> Tensor:
        factor = scale if len(scale) == 1 else scale[start:stop]
        factor = factor.reshape(-1, *[1] * (weight.ndim - 1))
        return float_rows(weight, start, stop).mul_(factor)

    return Made(weight.shape, rows, weight)


def _check_formats(file: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """ValueError if the file says of a layer that it is something else than scaled float8."""
    formats = {}
    try:
        layers = json.loads(header.get(HEADER, "{}")).get("layers", {})
        for name, layer in layers.items():
            formats[name] = layer.get("format")
        for key, tensor in tensors.items():
            if key.endswith(".comfy_quant"):
                formats[key] = json.loads(tensor.numpy().tobytes()).get("format")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise_interrupted(error)
        what = "describes its quantisation in a way that is not known here"
        raise ValueError(f"{file} {what}: {first_line(error)}; download it again") from error

    for name, kind in formats.items():
        if kind not in FORMATS:
            way_out = "take the fp16, bf16 or fp8_scaled file of the same model"
            raise ValueError(f"{file}: {name} is quantised as {kind}, not supported; {way_out}")


def unscaled(
    file: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]
) -> dict[str, Tensor | Made]:
    """The weights that ComfyUI's scaled float8 files mean: W = float8 * scale, in float32.

    Names as they are; without the scales, and what else describes the quantisation. Files that are
    not scaled come back as they are. header: a safetensors file's. ValueError for another
    quantisation, and for a scale that belongs to no weight.
    """
    _check_formats(file, tensors, header)
    found = {}
    scales = {}
    for key, tensor in tensors.items():
        if key.endswith(SCALES):
            scales[key] = tensor
        elif key.split(".")[-1] != "scaled_fp8" and not key.endswith(UNUSED):
            found[key] = tensor

    for key, scale in scales.items():
        name = key.rpartition(".")[0] + ".weight"
        weight = found.get(name)
        if weight is None:
            raise ValueError(f"{file} has {key} but no {name} (incomplete?); download it again")
        fits = scale.numel() == 1 or list(scale.shape) in ([len(weight)], [len(weight), 1])
        if isinstance(weight, Made) or not weight.is_floating_point() or not fits:
            sizes = f"{name} {list(weight.shape)} with a scale {list(scale.shape)}"
            way_out = "take the fp16, bf16 or fp8_scaled file of the same model"
            raise ValueError(f"{file}: {sizes} is no scaled float8; {way_out}")
        found[name] = _scaled(weight, scale)

    # Among scaled weights one without a scale has lost it.
    lone = [key for key, tensor in found.items() if scales and tensor.dtype.itemsize == 1]
    lone = [key for key in lone if key.endswith(".weight")]
    if lone:
        raise ValueError(f"{file} has no scale for {lone[0]} (incomplete?); download it again")
    return found

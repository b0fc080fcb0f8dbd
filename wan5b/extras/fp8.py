"""Linear layers in float8 (e4m3) for inference on Ada, Hopper and later.

Weights are rounded once, inputs as they come; each row of either has a scale of its own.
"""

from argparse import Namespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan5b.extras.cards import place_of_vae

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448


def check_options(args: Namespace, dtype: torch.dtype) -> None:
    """ValueError if a sampling script's --fp8 or --fp8-vae can't work: on its device, or in dtype.

    --fp8-attention depends on the DiT, too: see fp8_attention.check.
    """
    if args.fp8:
        check_linear(dtype, args.device)
    place = place_of_vae(args)
    if args.fp8_vae and (dtype != torch.bfloat16 or place == "cpu"):
        needs = "needs bfloat16 on a Hopper GPU (H100, H200)"
        raise ValueError(f"--fp8-vae {needs}, not {dtype} on {place}")


def check_linear(dtype: torch.dtype, device: str | torch.device) -> None:
    """ValueError if linear layers of this dtype on this device can't be run in float8."""
    device = torch.device(device)
    if device.type != "cuda" or dtype != torch.bfloat16:
        raise ValueError(f"--fp8 needs bfloat16 on a GPU (Ada, Hopper), not {dtype} on {device}")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise ValueError(
            f"--fp8 needs a GPU with float8 (Ada, Hopper), compute capability 8.9; "
            f"{name} has {capability[0]}.{capability[1]}: leave out --fp8"
        )


def quantize(x: Tensor, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """[R, C] -> float8 [R, C] and float32 scales [R, 1], with x = float8 * scale.

    A row's scale makes its largest value the largest float8. gelu: of gelu(x) instead of x.
    """
    x = x.float()
    if gelu:
        # The maximum is found without a second pass over gelu(x): it is gelu of x's maximum, or the
        # lowest value that gelu takes, -0.17.
        peak = F.gelu(x.amax(1, keepdim=True), approximate="tanh")
        peak = peak.clamp(min=0.1701)
        x = F.gelu(x, approximate="tanh")
    else:
        peak = x.abs().amax(1, keepdim=True)
        peak = peak.clamp(min=1e-12)  # a row of zeros
    scale = peak / LARGEST
    return (x * scale.reciprocal()).to(FP8), scale


class Fp8Linear(nn.Module):
    """nn.Linear with weight and input rounded to float8; bfloat16 in and out. Half the memory.

    gelu: the layer of gelu(x), which is not rounded in between.
    """

    def __init__(self, linear: nn.Linear, gelu: bool = False):
        super().__init__()
        weight, scale = quantize(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = scale.T.contiguous()
        self.bias = linear.bias
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        x8, scale = quantize(x.flatten(0, -2), self.gelu)
        options = {"out_dtype": x.dtype, "use_fast_accum": True}
        y = torch._scaled_mm(x8, self.weight.t(), scale, self.scale, self.bias, **options)
        return y.unflatten(0, x.shape[:-1])


def quantize_blocks(model: nn.Module) -> nn.Module:
    """Replace, in place, the linear layers of a WanDiT's blocks; embeddings and head stay.

    For inference: what is replaced can neither be trained nor exported, nor replaced again.
    """
    for block in model.blocks:
        for attention in (block.self_attn, block.cross_attn):
            for name in "qkvo":
                linear = getattr(attention, name)
                setattr(attention, name, Fp8Linear(linear))
        # gelu, which stands between the two layers, moves into the second one
        first, _, second = block.ffn
        block.ffn = nn.Sequential(Fp8Linear(first), Fp8Linear(second, gelu=True))
    return model

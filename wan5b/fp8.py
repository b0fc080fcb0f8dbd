"""Linear layers in float8 (e4m3) for inference on Hopper and later: one scale a row of x and of the weight, dynamic."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn


def _quantize(x: Tensor, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """[R, C] -> float8 [R, C] and float32 scales [R, 1], so that x = float8 * scale with the row's maximum kept.

    gelu: of gelu(x), in one pass over it, since the maximum of a row is gelu of x's (or of its lowest value, -0.17).
    """
    x = x.float()
    peak = (x if gelu else x.abs()).amax(1, keepdim=True)
    if gelu:
        peak, x = (F.gelu(y, approximate="tanh") for y in (peak, x))
    scale = peak.clamp(min=0.1701 if gelu else 1e-12) / torch.finfo(FP8).max
    return (x * scale.reciprocal()).to(FP8), scale


class Fp8Linear(nn.Module):
    """nn.Linear with weight and input rounded to float8; bfloat16 in and out. Holds half the memory.

    gelu: of gelu(x), which is not rounded in between.
    """

    def __init__(self, linear: nn.Linear, gelu: bool = False):
        super().__init__()
        weight, scale = _quantize(linear.weight.detach())
        self.weight, self.scale = nn.Parameter(weight, requires_grad=False), scale.T.contiguous()
        self.bias, self.gelu = linear.bias, gelu

    def forward(self, x: Tensor) -> Tensor:
        x8, scale = _quantize(x.flatten(0, -2), self.gelu)
        y = torch._scaled_mm(
            x8,
            self.weight.t(),
            scale,
            self.scale,
            self.bias,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
        return y.unflatten(0, x.shape[:-1])


def quantize_blocks(model: nn.Module) -> nn.Module:
    """Replace, in place, the linear layers of the transformer blocks; embeddings, modulation and head stay.

    For inference: what is replaced can neither be trained nor exported, nor replaced again.
    """
    for block in model.blocks:
        for attention in (block.self_attn, block.cross_attn):
            for name in "qkvo":
                setattr(attention, name, Fp8Linear(getattr(attention, name)))
        block.ffn = nn.Sequential(Fp8Linear(block.ffn[0]), Fp8Linear(block.ffn[2], gelu=True))
    return model

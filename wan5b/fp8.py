"""Linear layers in float8 (e4m3) for inference on Hopper and later: one scale a row of x and of the weight, dynamic."""

import torch
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """[R, C] -> float8 [R, C] and float32 scales [R, 1], so that x = float8 * scale with the row's maximum kept."""
    x = x.float()
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-12) / torch.finfo(FP8).max
    return (x / scale).to(FP8), scale


class Fp8Linear(nn.Module):
    """nn.Linear with weight and input rounded to float8; bfloat16 in and out. Holds half the memory."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, scale = _quantize(linear.weight.detach())
        self.weight, self.scale = nn.Parameter(weight, requires_grad=False), scale.T.contiguous()
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = _quantize(x.flatten(0, -2))
        scales = (scale, self.scale, self.bias)
        y = torch._scaled_mm(rows, self.weight.t(), *scales, out_dtype=x.dtype, use_fast_accum=True)
        return y.unflatten(0, x.shape[:-1])


def quantize_blocks(model: nn.Module) -> nn.Module:
    """Replace, in place, the linear layers of the transformer blocks; embeddings, modulation and head stay."""
    for module in list(model.blocks.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Fp8Linear(child))
    return model

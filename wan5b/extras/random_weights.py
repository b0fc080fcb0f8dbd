"""Networks and text embeddings without any download, for measurements and a first look: noise.

Always the same: the weights depend on nothing but the preset and the kind of device, an embedding
on its prompt.
"""

import torch
from torch import Tensor

from wan5b.dit import PRESETS, WanDiT
from wan5b.util import rng
from wan5b.vae22 import VAE22, VAEConfig


def random_dit(preset: str, device: str | torch.device, dtype: torch.dtype) -> WanDiT:
    """The DiT of a preset in its geometry, in dtype on the device."""
    with torch.device("meta"):
        model = WanDiT(PRESETS[preset]).to(dtype)
    model = model.to_empty(device=device)
    return model.init_weights(torch.Generator(device).manual_seed(0))


def random_vae(preset: str, device: str | torch.device) -> VAE22:
    """The VAE beside it, in float32: the released geometry, or a narrow one for "tiny"."""
    cfg = VAEConfig()
    if preset == "tiny":
        cfg = VAEConfig(dim=8, dec_dim=8)
    device = torch.device(device)
    # Not of all GPUs: torch would warn of that where there are several.
    drawn_on = [] if device.type == "cpu" else [device]
    with device, torch.random.fork_rng(drawn_on):
        torch.manual_seed(0)
        return VAE22(cfg)


def random_networks(
    preset: str, device: str | torch.device, dtype: torch.dtype
) -> tuple[WanDiT, VAE22]:
    """Both; the VAE is left in float32, for encoding."""
    return random_dit(preset, device, dtype), random_vae(preset, device)


def random_context(prompts: list[str], length: int, dim: int) -> Tensor:
    """Embeddings [B, length, dim] in place of a text encoder's, drawn from the prompts."""
    rows = [torch.randn(length, dim, generator=rng("cpu", prompt)) for prompt in prompts]
    return torch.stack(rows)

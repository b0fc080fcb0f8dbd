"""A linear codec with VAE22's interface, for worlds that are small enough for a CPU; and the halves
of either, apart.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan5b.vae22 import VAE22, Stream, VAEConfig, check_video


class LinearCodec(nn.Module):
    """A fixed linear transform in the VAE's place. Nothing carries grad.

    A patch of t frames x s x s pixels of one colour becomes its z_dim / 3 products with `basis`;
    decoding sums the patches of `dual` under these weights. Computes in the weights' dtype. There
    are no initial values: load a state dict.
    """

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.cfg = cfg
        shape = (cfg.z_dim // 3, 1, *cfg.strides)
        self.basis = nn.Parameter(torch.empty(shape))  # encodes
        self.dual = nn.Parameter(torch.empty(shape))  # decodes

    def stream(self) -> Stream:
        """State for one video through `decode_chunk`."""
        return Stream()

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """As VAE22's. The first latent frame is that of the first pixel frame repeated."""
        check_video(video, self.cfg)
        lead = video[:, :, :1].expand(-1, -1, self.cfg.strides[0] - 1, -1, -1)
        video = torch.cat([lead, video], dim=2)
        planes = video.flatten(0, 1).unsqueeze(1).to(self.basis.dtype)  # [B*3, 1, T, H, W]
        latent = F.conv3d(planes, self.basis, stride=self.cfg.strides)  # [B*3, C/3, T', H', W']
        return latent.unflatten(0, (-1, 3)).flatten(1, 2).float()

    def decode(self, latent: Tensor) -> Tensor:
        """As VAE22's."""
        return self.decode_chunk(latent, self.stream())

    @torch.no_grad()
    def decode_chunk(self, latent: Tensor, state: Stream) -> Tensor:
        """As VAE22's. The video's first frame is the mean of those of its patch."""
        z = latent.unflatten(1, (3, -1)).flatten(0, 1).to(self.dual.dtype)  # [B*3, C/3, T, H, W]
        planes = F.conv_transpose3d(z, self.dual, stride=self.cfg.strides)
        video = planes.unflatten(0, (-1, 3)).squeeze(2)  # [B, 3, 4T, 16H, 16W]
        if state.first:
            lead, rest = video.tensor_split([self.cfg.strides[0]], dim=2)
            video = torch.cat([lead.mean(2, keepdim=True), rest], dim=2)
        state.first = False
        return video


def split_vae(vae: VAE22 | LinearCodec, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder of a VAE in float32: the first stays so, since bfloat16 spoils an image,
    the second is in dtype.
    """
    if dtype == torch.float32:
        return vae, vae
    decoder = copy.deepcopy(vae)
    if isinstance(vae, VAE22):  # half of each is of no use
        vae.decoder.to("meta")
        decoder.encoder.to("meta")
    return vae, decoder.to(dtype)

"""Synthetic release folders: the real layout and file formats, tiny widths, random weights.

python tests/release.py /tmp/x
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from wan5b.dit import DiTConfig, WanDiT
from wan5b.t5 import T5Config, T5Encoder
from wan5b.vae22 import VAE22, VAEConfig

SPIECE = Path(__file__).parent / "golden" / "tokenizer" / "spiece.model"
DIT = DiTConfig(128, 256, 2, 3, text_dim=64, freq_dim=64)
VAE = VAEConfig(dim=4, dec_dim=8)
# vocab: the ids of the golden spiece.model.
T5 = T5Config(vocab=520, dim=64, dim_attn=64, dim_ffn=96, num_heads=4, num_layers=2)
# Spelled as in Wan-AI/Wan2.2-TI2V-5B: no text_dim, no patch_size.
CONFIG_KEYS = (
    "dim",
    "eps",
    "ffn_dim",
    "freq_dim",
    "in_dim",
    "model_type",
    "num_heads",
    "num_layers",
    "out_dim",
    "text_len",
)


def random_weights(model, seed):
    """Noise of the scale that keeps activations finite, around 1 for norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, w in model.named_parameters():
            gain = w.ndim == 1 and "norm" in name or name.endswith("gamma")
            mean = 1.0 if gain else 0.0
            spread = 0.5 * w[0].numel() ** -0.5 if w.ndim > 1 else 0.1
            w.normal_(mean, spread, generator=generator)
    return model


def write_dit(folder, cfg=DIT, shards=3, single=False, seed=0, weights=None):
    """config.json and the DiT's weights: shards and their index, or one file.

    weights: the state dict to write; by default random ones, of this seed. Returns it.
    """
    name = "diffusion_pytorch_model"
    config = {"_class_name": "WanModel", "_diffusers_version": "0.33.0"}  # which are no sizes
    config |= {key: getattr(cfg, key) for key in CONFIG_KEYS}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weights = weights or random_weights(WanDiT(cfg), seed).state_dict()
    if single:
        save_file(weights, folder / f"{name}.safetensors")
        return weights

    files = [f"{name}-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {key: files[i * shards // len(weights)] for i, key in enumerate(weights)}
    for file in files:
        shard = {key: weights[key] for key in weights if weight_map[key] == file}
        save_file(shard, folder / file, {"format": "pt"})
    size = sum(w.nbytes for w in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return weights


def make_release(folder, shards=3, single=False, dit=DIT, vae=VAE, t5=T5):
    """A release folder; deterministic. dit.text_dim must be t5.dim."""
    folder = Path(folder)
    tokenizer = folder / "google" / "umt5-xxl"
    tokenizer.mkdir(parents=True)
    shutil.copy(SPIECE, tokenizer / SPIECE.name)
    write_dit(folder, dit, shards, single)
    vae = random_weights(VAE22(vae), 1)
    torch.save(vae.state_dict(), folder / "Wan2.2_VAE.pth")
    t5 = random_weights(T5Encoder(t5).bfloat16(), 2)
    torch.save(t5.state_dict(), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    return folder


if __name__ == "__main__":
    print(make_release(sys.argv[1]))

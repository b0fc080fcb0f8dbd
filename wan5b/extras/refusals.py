"""Models that can't be run here, recognised by their keys and sizes, and what to take instead."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

TAKE_FP = "take the fp16, bf16 or fp8_scaled file of the same model"
LORA = "a LoRA, no model; give it as one, beside the weights it was made for"
TAKE_5B = "take Wan-AI/Wan2.2-TI2V-5B or a fine-tune of just its weights"

# A pattern that one whole key fits -> what the model is, and the way out. The first one wins.
REFUSED = {
    # other ways to store weights
    r".*quantized_weight_values": "packed NVFP4 of LongLive 2; take model_bf16.pt or model_te.pt",
    r".*\.weight_scale_2": f"NVFP4, which needs kernels of its own; {TAKE_FP}",
    r".*\.(qweight|wscales|smooth_factor\w*|proj_down|proj_up)": f"nunchaku's SVDQuant; {TAKE_FP}",
    r".*\.(SCB|absmax|quant_map|quant_state\..*)": f"quantised by bitsandbytes; {TAKE_FP}",
    # adapters
    r"lycoris_.*|.*[._](hada|lokr|oft|boft|glora)_.*|.*\.dora_scale|.*\.w_norm": (
        "a LyCORIS or DoRA adapter, not supported; merge it where it was made, or train a LoRA"
    ),
    r".*\.lora_magnitude_vector.*": (
        "a DoRA, not supported; merge it where it was made, or train it with use_dora false"
    ),
    r".*\.(lora_(A|B|down|up)|lora\.(down|up))(\.\w+)?\.weight|.*\.diff(_b|_m)?": (LORA),
    # Wan with more inputs
    r".*\.cam_self_attn\..*": (
        f"DreamX-World, whose attention needs camera matrices; use its own code, or {TAKE_5B}"
    ),
    r".*\.to_out_prope\..*|condition_embedder\.action_embedder\..*": (
        f"HY-WorldPlay, steered by actions and camera poses; use its own code, or {TAKE_5B}"
    ),
    r"(.*\.)?\w*action\w*\..*": (
        "a world model with action modules (as ABot-World), which need controls; use its own "
        f"code, or {TAKE_5B}"
    ),
    r".*\.to_gate_compress\..*": (
        "the sparse-attention (VSA) FastWan, another function without its kernels; take "
        "FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers"
    ),
    r"(.*\.)?vace_.*": f"VACE, steered by a video and masks; {TAKE_5B}",
    r"(.*\.)?(control_adapter|control_conv|ref_conv|cam_encoder)\..*": (
        f"a model with a control or camera input (Wan-Fun, DreamX-World); {TAKE_5B}"
    ),
    r"img_emb\..*|.*\.(norm_)?[kv]_img\..*|condition_embedder\.image_embedder\..*"
    r"|.*\.(add_[kv]_proj|norm_added_k)\..*": (
        f"Wan2.1 I2V or FLF2V, with an image encoder; {TAKE_5B}, which takes images itself"
    ),
    r"(.*\.)?(audio|motion_encoder|face_adapter|face_encoder|casual_audio_encoder)\w*\..*": (
        f"a model with audio or motion inputs (Ovi, S2V, Animate); {TAKE_5B}"
    ),
    r".*\.attn1\.to_qkv\..*|.*\.attn2\.to_kv\..*": (
        "saved with fused projections; call unfuse_qkv_projections() and save it again"
    ),
    # another VAE
    r"encoder\.downsamples\.\d+\.(residual|resample|time_conv|shortcut)\..*"
    r"|encoder\.down_blocks\.\d+\.(norm1|conv1|resample)\..*"
    r"|decoder\.up_blocks\.\d+\.upsamplers\..*": (
        "Wan2.1's VAE (4x8x8, 16 channels); take Wan2.2_VAE.pth, AutoencoderKLWan of the 5B, or "
        "ComfyUI's wan2.2_vae.safetensors"
    ),
}
PATTERNS = [(re.compile(pattern), what) for pattern, what in REFUSED.items()]

# Input channels of a DiT's patch embedding; from CONTROL on a control video is among them.
CHANNELS = {
    36: f"Wan I2V, with 36 input channels; {TAKE_5B}, which takes images itself",
    96: f"Lucy-Edit, with 96 input channels, which edits videos; {TAKE_5B}",
}
CONTROL = 100
WAN21 = {1536: "Wan2.1 1.3B", 5120: "Wan 14B"}  # by width

NOT_TENSORS = (torch.uint8, torch.int8, torch.int32)
CHECKPOINT_FORMATS = {
    "longlive_generator_nvfp4": "packed NVFP4 of LongLive 2; take model_bf16.pt or model_te.pt",
    "longlive_generator_te_nvfp4": "old NVFP4 of LongLive 2; take model_bf16.pt or model_te.pt",
}


def refuse(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """ValueError if a key shows a model that can't be run: which it is, and the way out.

    tensors: by upstream's or diffusers' names, a model's prefix taken off.
    """
    for pattern, what in PATTERNS:
        found = next((key for key in tensors if pattern.fullmatch(key)), None)
        if found:
            raise ValueError(f"{file} is {what} (it holds {found})")
    for key, tensor in tensors.items():
        if key.endswith(".weight") and tensor.dtype in NOT_TENSORS:
            raise ValueError(f"{file} is quantised ({key} is {tensor.dtype}); {TAKE_FP}")


def refuse_sizes(file: Path, tensors: Mapping[str, Tensor], channels: int = 0) -> None:
    """ValueError for a DiT with other inputs than latents. tensors: by upstream's names.

    channels: the latent channels needed; 0: any.
    """
    patch = tensors.get("patch_embedding.weight")
    if patch is None:
        return
    dim, in_dim = patch.shape[:2]
    if in_dim in CHANNELS and in_dim != channels:
        raise ValueError(f"{file} is {CHANNELS[in_dim]}")
    if in_dim >= CONTROL and in_dim != channels:
        what = f"a control or camera model, with {in_dim} input channels"
        raise ValueError(f"{file} is {what}; {TAKE_5B}")
    if in_dim == 16 and dim in WAN21 and channels not in (0, 16):
        what = f"{WAN21[dim]}, for the 16 latent channels of Wan2.1's VAE"
        raise ValueError(f"{file} is {what} where {channels} are needed; {TAKE_5B}")


def refuse_file(file: Path) -> None:
    """ValueError for a GGUF file, which is none of the formats read here."""
    with file.open("rb") as f:
        if f.read(4) == b"GGUF":
            raise ValueError(f"{file} is a GGUF file, quantised in blocks; {TAKE_FP}")


def refuse_held(file: Path, held: Mapping) -> None:
    """ValueError for a trainer's .pt that holds packed weights, or a LoRA alone."""
    what = CHECKPOINT_FORMATS.get(str(held.get("checkpoint_format")))
    if "generator_lora" in held:
        what = LORA
    if what:
        raise ValueError(f"{file} is {what}")

"""Other people's names and sizes <-> upstream's: diffusers, transformers, ComfyUI. No files here.

A table has upstream's names on the left and the other layout's on the right. {n} is a number,
{a|b} one of these words; what a placeholder stands for carries over by its position. Names are
matched as a whole, so each has one place or none.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Literal

from torch import Tensor

from wan5b.dit import DiTConfig
from wan5b.extras.refusals import refuse
from wan5b.extras.scaled import Made, equal, unscaled
from wan5b.vae22 import LATENT_MEAN, LATENT_STD, VAEConfig
from wan5b.weights import clean

Kind = Literal["dit", "vae", "t5"]
Table = dict[str, str]

# ------------------------------------------------------------------------------------------- tables

WB = "{weight|bias}"
SELF, CROSS = "blocks.{n}.self_attn", "blocks.{n}.cross_attn"
CONDITION = "condition_embedder"
DIT = {
    f"patch_embedding.{WB}": f"patch_embedding.{WB}",
    f"text_embedding.0.{WB}": f"{CONDITION}.text_embedder.linear_1.{WB}",
    f"text_embedding.2.{WB}": f"{CONDITION}.text_embedder.linear_2.{WB}",
    f"time_embedding.0.{WB}": f"{CONDITION}.time_embedder.linear_1.{WB}",
    f"time_embedding.2.{WB}": f"{CONDITION}.time_embedder.linear_2.{WB}",
    f"time_projection.1.{WB}": f"{CONDITION}.time_proj.{WB}",
    f"{SELF}.{{q|k|v}}.{WB}": f"blocks.{{n}}.attn1.to_{{q|k|v}}.{WB}",
    f"{SELF}.o.{WB}": f"blocks.{{n}}.attn1.to_out.0.{WB}",
    f"{SELF}.norm_{{q|k}}.weight": "blocks.{n}.attn1.norm_{q|k}.weight",
    f"{CROSS}.{{q|k|v}}.{WB}": f"blocks.{{n}}.attn2.to_{{q|k|v}}.{WB}",
    f"{CROSS}.o.{WB}": f"blocks.{{n}}.attn2.to_out.0.{WB}",
    f"{CROSS}.norm_{{q|k}}.weight": "blocks.{n}.attn2.norm_{q|k}.weight",
    # The norm before cross-attention, the only one with parameters, is diffusers' second.
    f"blocks.{{n}}.norm3.{WB}": f"blocks.{{n}}.norm2.{WB}",
    f"blocks.{{n}}.ffn.0.{WB}": f"blocks.{{n}}.ffn.net.0.proj.{WB}",
    f"blocks.{{n}}.ffn.2.{WB}": f"blocks.{{n}}.ffn.net.2.{WB}",
    "blocks.{n}.modulation": "blocks.{n}.scale_shift_table",
    "head.modulation": "scale_shift_table",
    f"head.head.{WB}": f"proj_out.{WB}",
}

LAYER = "encoder.block.{n}.layer"
T5 = {
    "token_embedding.weight": "shared.weight",
    "norm.weight": "encoder.final_layer_norm.weight",
    "blocks.{n}.norm1.weight": f"{LAYER}.0.layer_norm.weight",
    "blocks.{n}.norm2.weight": f"{LAYER}.1.layer_norm.weight",
    "blocks.{n}.attn.{q|k|v|o}.weight": f"{LAYER}.0.SelfAttention.{{q|k|v|o}}.weight",
    "blocks.{n}.pos_embedding.embedding.weight": (
        f"{LAYER}.0.SelfAttention.relative_attention_bias.weight"
    ),
    "blocks.{n}.ffn.gate.0.weight": f"{LAYER}.1.DenseReluDense.wi_0.weight",
    "blocks.{n}.ffn.fc1.weight": f"{LAYER}.1.DenseReluDense.wi_1.weight",
    "blocks.{n}.ffn.fc2.weight": f"{LAYER}.1.DenseReluDense.wo.weight",
}
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")  # the same tensor, twice or once

# The parts of a residual block of the VAE.
RESIDUAL = {
    "residual.0.gamma": "norm1.gamma",
    f"residual.2.{WB}": f"conv1.{WB}",
    "residual.3.gamma": "norm2.gamma",
    f"residual.6.{WB}": f"conv2.{WB}",
    f"shortcut.{WB}": f"conv_shortcut.{WB}",
}


def vae_table(num_res_blocks: int) -> Table:
    """num_res_blocks: the index upstream of the resampling behind them, which diffusers drops."""
    side = "{encoder|decoder}"
    down = "encoder.downsamples.{n}.downsamples"
    up = "decoder.upsamples.{n}.upsamples"
    table = {
        f"conv1.{WB}": f"quant_conv.{WB}",
        f"conv2.{WB}": f"post_quant_conv.{WB}",
        f"{side}.conv1.{WB}": f"{side}.conv_in.{WB}",
        f"{side}.head.0.gamma": f"{side}.norm_out.gamma",
        f"{side}.head.2.{WB}": f"{side}.conv_out.{WB}",
        f"{side}.middle.1.norm.gamma": f"{side}.mid_block.attentions.0.norm.gamma",
    }
    for name in ("to_qkv", "proj"):
        table[f"{side}.middle.1.{name}.{WB}"] = f"{side}.mid_block.attentions.0.{name}.{WB}"

    residuals = {
        f"{side}.middle.0": f"{side}.mid_block.resnets.0",
        f"{side}.middle.2": f"{side}.mid_block.resnets.1",
        f"{down}.{{n}}": "encoder.down_blocks.{n}.resnets.{n}",
        f"{up}.{{n}}": "decoder.up_blocks.{n}.resnets.{n}",
    }
    for ours, theirs in residuals.items():
        for part, their_part in RESIDUAL.items():
            table[f"{ours}.{part}"] = f"{theirs}.{their_part}"

    # A stage of the decoder has one residual block more.
    for name in ("resample.1", "time_conv"):
        of_down = f"encoder.down_blocks.{{n}}.downsampler.{name}.{WB}"
        table[f"{down}.{num_res_blocks}.{name}.{WB}"] = of_down
        of_up = f"decoder.up_blocks.{{n}}.upsampler.{name}.{WB}"
        table[f"{up}.{num_res_blocks + 1}.{name}.{WB}"] = of_up
    return table


class Names:
    """One direction of a table: names(name) is the other layout's name, None if it has none."""

    def __init__(self, table: Mapping[str, str]):
        self.rules = []
        for source, target in table.items():
            template = re.sub(r"\{[^}]*\}", "{}", target)
            self.rules.append((_pattern(source), template))

    def __call__(self, name: str) -> str | None:
        for pattern, template in self.rules:
            match = pattern.fullmatch(name)
            if match:
                return template.format(*match.groups())
        return None


def _pattern(template: str) -> re.Pattern:
    parts = []
    for text in re.split(r"(\{[^}]*\})", template):
        if text == "{n}":
            parts.append(r"(\d+)")
        elif text.startswith("{"):
            parts.append(f"({text[1:-1]})")
        else:
            parts.append(re.escape(text))
    return re.compile("".join(parts))


@lru_cache
def names(kind: Kind, *, back: bool = False, num_res_blocks: int = 2) -> Names:
    """From diffusers' or transformers' names to upstream's; back: from upstream's to theirs."""
    table = {"dit": DIT, "vae": vae_table(num_res_blocks), "t5": T5}[kind]
    if back:
        return Names(table)
    return Names({theirs: ours for ours, theirs in table.items()})


# ---------------------------------------------------------------------------------------- recognise

# What ComfyUI puts in front, longest first; a full checkpoint holds all three models.
PREFIXES = {
    "dit": ("model.diffusion_model.", "diffusion_model."),
    "vae": ("first_stage_model.", "vae."),
    "t5": ("text_encoders.umt5xxl.transformer.", "text_encoders.umt5xxl.", "text_encoders."),
}
# Keys that only the other layout has.
MARKS = {
    "dit": re.compile(r"condition_embedder\..*|proj_out\..*|(.*\.)?scale_shift_table"),
    "vae": re.compile(r"quant_conv\..*|post_quant_conv\..*|.*\.mid_block\..*"),
    "t5": re.compile(r"shared\.weight|encoder\..*"),
}
# What stands beside a model in its file and is none of its weights.
BESIDE = {
    "dit": re.compile(r"rope\..*"),
    "vae": re.compile(r"(?!)"),
    "t5": re.compile(r"spiece_model|logit_scale"),
}
RESNET = re.compile(r"encoder\.down_blocks\.0\.resnets\.(\d+)\..*")


def part_of(kind: Kind, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one model, without the prefix that ComfyUI puts in front of its names.

    Of a full checkpoint those of the other models are left out.
    """
    own = {}
    unnamed = {}
    every = tuple(prefix for prefixes in PREFIXES.values() for prefix in prefixes)
    for key, tensor in tensors.items():
        prefix = next((prefix for prefix in PREFIXES[kind] if key.startswith(prefix)), None)
        if prefix:
            own[key.removeprefix(prefix)] = tensor
        elif not key.startswith(every):
            unnamed[key] = tensor
    return own | unnamed


def foreign(kind: Kind, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a model has diffusers' or transformers' names, not upstream's."""
    return any(MARKS[kind].fullmatch(key) for key in tensors)


def tokenizer_bytes(tensors: Mapping[str, Tensor]) -> bytes | None:
    """The SentencePiece model that ComfyUI keeps in its umt5 files, for `t5.Tokenizer`."""
    tensor = part_of("t5", tensors).get("spiece_model")
    return None if tensor is None else tensor.numpy().tobytes()


def upstream(
    file: Path, kind: Kind, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
) -> dict[str, Tensor | Made]:
    """A model's tensors by upstream's names, whatever the layout. Nothing is read, or made, yet.

    tensors: by the file's own names. header: the safetensors file's, where ComfyUI describes its
    quantisation. Keys that upstream doesn't have either are left for `weights.blank` to name.
    ValueError for a model that can't be run, by its name, and for keys without a place.
    """
    own = part_of(kind, tensors)
    cleaned = {clean(key): tensor for key, tensor in own.items()}
    if len(cleaned) < len(own):
        raise ValueError(f"{file} has keys that differ only by a wrapper's prefix; save one model")
    refuse(file, cleaned)
    kept = {key: tensor for key, tensor in cleaned.items() if not BESIDE[kind].fullmatch(key)}
    found = unscaled(file, kept, header or {})
    if not foreign(kind, found):
        return found

    if kind == "t5":
        found = _one_embedding(file, found)
    rename = names(kind, num_res_blocks=_num_res_blocks(found))
    renamed = {key: rename(key) for key in found}
    strange = [key for key, name in renamed.items() if name is None]
    if strange:
        which = f"{len(strange)} keys that its layout hasn't ({', '.join(strange[:3])})"
        way_out = "take Wan-AI/Wan2.2-TI2V-5B-Diffusers or a fine-tune of just that"
        raise ValueError(f"{file} has {which}: another model? {way_out}")
    return {renamed[key]: tensor for key, tensor in found.items()}


def _num_res_blocks(tensors: Mapping[str, Tensor]) -> int:
    """Residual blocks in a stage of a VAE's encoder, by diffusers' names."""
    matches = [RESNET.fullmatch(key) for key in tensors]
    indices = [int(match[1]) for match in matches if match]
    return max(indices) + 1 if indices else VAEConfig.num_res_blocks


def _one_embedding(file: Path, tensors: dict[str, Tensor | Made]) -> dict[str, Tensor | Made]:
    """The token embedding once, under the first of `EMBEDDINGS`. ValueError if two differ."""
    held = [tensors[key] for key in EMBEDDINGS if key in tensors]
    if len(held) == 2 and not equal(*held):
        both = " and ".join(EMBEDDINGS)
        raise ValueError(f"{file} holds two embeddings, {both}, that differ; save it with one")
    rest = {key: tensor for key, tensor in tensors.items() if key not in EMBEDDINGS}
    if held:
        rest[EMBEDDINGS[0]] = held[0]
    return rest


# ------------------------------------------------------------------------------------------ configs

# Per kind: our field -> theirs, where the value carries over.
FIELDS = {
    "dit": {
        "num_heads": "num_attention_heads",
        "ffn_dim": "ffn_dim",
        "freq_dim": "freq_dim",
        "num_layers": "num_layers",
        "text_dim": "text_dim",
        "eps": "eps",
        "patch_size": "patch_size",
        "cross_attn_norm": "cross_attn_norm",
        "in_dim": "in_channels",
        "out_dim": "out_channels",
    },
    "vae": {
        "dim": "base_dim",
        "dec_dim": "decoder_base_dim",
        "z_dim": "z_dim",
        "dim_mult": "dim_mult",
        "num_res_blocks": "num_res_blocks",
        "temperal_downsample": "temperal_downsample",
    },
    "t5": {
        "vocab": "vocab_size",
        "dim": "d_model",
        "dim_ffn": "d_ff",
        "num_heads": "num_heads",
        "num_layers": "num_layers",
        "num_buckets": "relative_attention_num_buckets",
    },
}
# Values that must be there, since every other value is another network.
REQUIRED = {
    "dit": {"qk_norm": "rms_norm_across_heads"},
    "vae": {
        "is_residual": True,
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_spatial": 16,
        "scale_factor_temporal": 4,
        "latents_mean": list(LATENT_MEAN),
        "latents_std": list(LATENT_STD),
    },
    "t5": {
        "model_type": "umt5",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "quantization_config": None,
    },
}
# Fields without effect here. Of a T5 only what is required or carried over is looked at:
# transformers writes dozens of fields, most of them about training and generation.
NO_EFFECT = {
    "dit": {"attention_head_dim", "rope_max_seq_len"},
    "vae": {"clip_output", "dropout"},
}
EMPTY = (None, False, [], {})  # a field with such a value asks for nothing


def config_fields(file: Path, kind: Kind, config: Mapping) -> dict:
    """Fields of DiTConfig, VAEConfig or T5Config that a config.json of diffusers or transformers
    names; sizes it leaves out are left to the tensors' shapes.

    file: for errors. ValueError for whatever makes another network of it.
    """
    theirs = FIELDS[kind]
    for key, needed in REQUIRED[kind].items():
        if config.get(key) != needed:
            got = f"{key} {config.get(key)!r}"
            raise ValueError(f"{file}: {got} where Wan2.2-TI2V-5B has {needed!r}: another network")
    if kind != "t5":
        known = {*theirs.values(), *REQUIRED[kind], *NO_EFFECT[kind]}
        for key, value in config.items():
            if key not in known and not key.startswith("_") and value not in EMPTY:
                said = f"{key if key.isprintable() else repr(key)} {value!r}"
                raise ValueError(f"{file}: {said} belongs to another network than Wan2.2-TI2V-5B")

    fields = {name: config[key] for name, key in theirs.items() if config.get(key) is not None}
    for name, value in fields.items():
        if isinstance(value, list):
            fields[name] = tuple(value)
    if kind == "dit" and "num_heads" in fields:
        fields["dim"] = fields["num_heads"] * config.get("attention_head_dim", 128)
    if kind == "vae" and "dim" in fields:
        fields.setdefault("dec_dim", fields["dim"])
    if kind == "t5" and "num_heads" in fields and "d_kv" in config:
        fields["dim_attn"] = fields["num_heads"] * config["d_kv"]
    return fields


def is_foreign_config(config: Mapping) -> bool:
    """Whether a config.json is one for `config_fields`; else it has upstream's fields."""
    return not config.keys().isdisjoint(("num_attention_heads", "base_dim", "d_model"))


def diffusers_config(cfg: DiTConfig) -> dict:
    """The config.json of diffusers' WanTransformer3DModel for a network of these sizes."""
    config = {"_class_name": "WanTransformer3DModel", "_diffusers_version": "0.42.1"}
    for name, key in FIELDS["dit"].items():
        config[key] = getattr(cfg, name)
    return config | {
        "attention_head_dim": cfg.head_dim,
        "patch_size": list(cfg.patch_size),
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "added_kv_proj_dim": None,
        "image_dim": None,
        "pos_embed_seq_len": None,
    }


def diffusers_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A DiT's tensors by diffusers' names. The file's header must say {"format": "pt"}."""
    rename = names("dit", back=True)
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    assert None not in renamed, "a name that upstream hasn't"
    return renamed

"""The small JSON files of a release, of diffusers and of transformers, as their code saves them: by
diffusers 0.42.1 and transformers 5.24.0.
"""

from collections.abc import Mapping

from wan5b.dit import DiTConfig
from wan5b.extras import layouts
from wan5b.extras.layouts import FIELDS, REQUIRED
from wan5b.t5 import T5Config
from wan5b.vae22 import VAEConfig

DIFFUSERS = {"_diffusers_version": "0.42.1"}
# Fields of DiTConfig that a release's config.json names. Upstream's class ignores any other there,
# and takes 4096 for text_dim.
ORIGINAL = ["dim", "eps", "ffn_dim", "freq_dim", "in_dim", "model_type", "num_heads", "num_layers"]
ORIGINAL += ["out_dim", "text_len"]

# What configs hold beside the sizes and the values that layouts.REQUIRED has.
VAE = {"_class_name": "AutoencoderKLWan", **DIFFUSERS, "attn_scales": [], "dropout": 0.0}
T5 = {
    "architectures": ["UMT5EncoderModel"],
    "classifier_dropout": 0.0,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_decoder": False,
    "is_encoder_decoder": True,
    "pad_token_id": 0,
    "scale_decoder_outputs": False,
    "tie_word_embeddings": True,  # false made transformers 5.0 forget the embedding
    "transformers_version": "5.24.0",
    "use_cache": True,
}
SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    **DIFFUSERS,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "disable_corrector": [],
    "dynamic_thresholding_ratio": 0.995,
    "final_sigmas_type": "zero",
    "flow_shift": 5.0,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "shift_terminal": None,
    "sigma_max": None,
    "sigma_min": None,
    "solver_order": 2,
    "solver_p": None,
    "solver_type": "bh2",
    "steps_offset": 0,
    "thresholding": False,
    "time_shift_type": "exponential",
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_dynamic_shifting": False,
    "use_exponential_sigmas": False,
    "use_flow_sigmas": True,
    "use_karras_sigmas": False,
}
MODEL_INDEX = {
    "_class_name": "WanPipeline",
    **DIFFUSERS,
    "boundary_ratio": None,
    "expand_timesteps": True,
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
# Enough for transformers to make the tokenizer from a spiece.model alone.
TOKENIZER = {
    "eos_token": "</s>",
    "extra_ids": 0,
    "model_max_length": 512,
    "pad_token": "<pad>",
    "tokenizer_class": "T5Tokenizer",
    "unk_token": "<unk>",
}


def original_config(cfg: DiTConfig) -> dict:
    """The config.json of a release for a network of these sizes."""
    sizes = {name: getattr(cfg, name) for name in ORIGINAL}
    return {"_class_name": "WanModel", "_diffusers_version": "0.33.0"} | sizes


def dit_config(cfg: DiTConfig) -> dict:
    """Of diffusers' WanTransformer3DModel."""
    return layouts.diffusers_config(cfg)


def vae_config(cfg: VAEConfig) -> dict:
    """Of diffusers' AutoencoderKLWan."""
    sizes = {theirs: getattr(cfg, ours) for ours, theirs in FIELDS["vae"].items()}
    return VAE | REQUIRED["vae"] | sizes


def t5_config(cfg: T5Config) -> dict:
    """Of transformers' UMT5EncoderModel, but for the dtype."""
    sizes = {theirs: getattr(cfg, ours) for ours, theirs in FIELDS["t5"].items()}
    sizes["d_kv"] = cfg.dim_attn // cfg.num_heads
    sizes["num_decoder_layers"] = cfg.num_layers
    # What is required to be None is to be absent.
    required = {key: value for key, value in REQUIRED["t5"].items() if value is not None}
    return T5 | required | sizes


def model_index(scheduler: Mapping, pipeline: str) -> dict:
    """Of diffusers' pipeline of that class. scheduler: its config."""
    name = scheduler.get("_class_name", SCHEDULER["_class_name"])
    return MODEL_INDEX | {"_class_name": pipeline, "scheduler": ["diffusers", name]}

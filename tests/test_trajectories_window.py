"""Trajectories of a causal model are made behind the frames that it was trained to see."""

import pytest
import torch
from common import rel
from release import make_release

import prepare
from wan5b.data import Store, TextStore
from wan5b.distill import guided, rollout
from wan5b.extras.formats import load_dit
from wan5b.flow import shift_sigma
from wan5b.kvcache import KVCache
from wan5b.util import rng
from wan5b.weights import save_dit

FRAMES = 4  # latent


@pytest.mark.parametrize("window", [2, 9])
def test_the_window_of_training(tmp_path, window):
    release = make_release(tmp_path / "tiny")
    weights = tmp_path / "ar.safetensors"
    save_dit(load_dit(release), weights, {"stage": "ar", "chunk": 1, "window": window})
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox")
    common = ["--release", release, "--out"]
    run("text", "--prompts", prompts, *common, tmp_path / "text")
    options = ["--text", tmp_path / "text", "--weights", weights, "--causal", "--guidance", 2]
    options += ["--size", "32x64", "--frames", 4 * FRAMES - 3, "--steps", 4, "--seed", 7]
    run("trajectories", *options, *common, tmp_path / "out")
    made = Store(tmp_path / "out")[0]["x"][-1]

    model = load_dit(weights)
    text = TextStore(tmp_path / "text")
    context = text.batch(["a red fox", text.facts["negative"]], model.cfg.text_len)
    generator = rng("cpu", 7, "trajectory", 0)
    noise = torch.randn(1, 48, FRAMES, 2, 4, generator=generator)
    sigmas = [shift_sigma(1 - i / 4) for i in range(5)]

    def behind(frames):
        """The clip where each chunk sees so many frames, itself included."""
        cache = KVCache(model.cfg, 2, FRAMES, model.cfg.tokens_per_frame(2, 4), frames)
        plan = (noise, context, sigmas, [1] * FRAMES, cache)
        with torch.no_grad():
            return torch.cat(list(rollout(guided(model, 2.0), *plan, solver="euler")), 2)[0]

    assert rel(made, behind(window)) < 1e-5
    others = rel(made, behind(None))
    assert (others < 1e-5) == (window >= FRAMES), others


def test_a_chunk_beyond_the_window_is_refused(tmp_path):
    """It ended in the cache's assertion, behind the loading."""
    release = make_release(tmp_path / "tiny")
    weights = tmp_path / "ar.safetensors"
    save_dit(load_dit(release), weights, {"stage": "ar", "chunk": 1, "window": 2})
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox")
    common = ["--release", release, "--out"]
    run("text", "--prompts", prompts, *common, tmp_path / "text")
    options = ["--text", tmp_path / "text", "--weights", weights, "--causal", "--chunk", FRAMES]
    options += ["--size", "32x64", "--frames", 4 * FRAMES - 3]
    with pytest.raises(ValueError, match="--chunk 4 does not fit in the window of 2 frames"):
        run("trajectories", *options, *common, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def run(*arguments):
    prepare.main([str(argument) for argument in arguments])

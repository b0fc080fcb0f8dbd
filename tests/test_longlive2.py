"""LongLive 2's procedure against what its own code made: rolling windows, images, prompts, scene cuts.

The vectors (golden/longlive2) are of NVlabs/LongLive 7860ad9, float32, CPU, tiny random weights.
"""

import json

import pytest
import torch
from common import GOLDEN, rel
from safetensors.torch import load_file

from wan5b.distill import guided, rollout
from wan5b.extras.formats import load_dit
from wan5b.extras.sampling import generate
from wan5b.flow import sampling_sigmas
from wan5b.kvcache import KVCache

FOLDER = GOLDEN / "longlive2"
ABOUT = json.loads((FOLDER / "cases.json").read_text())
CASES = ABOUT["cases"]
CUT = "The scene transitions. "


@pytest.fixture(scope="module")
def model():
    return load_dit(FOLDER / "model_bf16.pt")


@pytest.fixture(scope="module")
def tensors():
    return load_file(FOLDER / "cases.safetensors")


def inputs(case: dict, tensors: dict, name: str):
    """Noise behind the image, a text for each chunk, chunks, cuts, image; all in our layout."""
    noise = tensors[f"{name}.noise"].transpose(1, 2)  # [1, C, T, H, W]
    image = tensors.get(f"{name}.image")
    chunks = [case["block"]] * (case["frames"] // case["block"])
    if image is not None:
        image = image.transpose(1, 2)
        noise = noise[:, :, 1:]
        chunks[0] -= 1
    one = {i: tensors["context"][i : i + 1] for i in set(case["context_index"])}
    texts = [one[i] for i in case["context_index"]]
    cuts = {}
    for index, prompt in enumerate(case["prompts"]):
        if index and prompt.startswith(CUT):
            cuts[index] = case["multi_shot_rope_offset"]
    return noise, texts, chunks, cuts, image


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_equals_its_own_code(model, tensors, name):
    case = CASES[name]
    noise, texts, chunks, cuts, image = inputs(case, tensors, name)
    sigmas = sampling_sigmas(case["steps"], case["shift"])
    field = model
    if case["guidance"] != 1:
        field = guided(model, case["guidance"])
        negative = tensors["context"][case["negative_index"]][None]
        both = {id(text): torch.cat([text, negative]) for text in texts}
        texts = [both[id(text)] for text in texts]
    tokens = model.cfg.tokens_per_frame(*noise.shape[3:])
    window = min(case["window"], case["frames"])
    memory = (len(texts[0]), window, tokens, case["window"], case["sink"])
    cache = KVCache(model.cfg, *memory)
    made = rollout(
        field,
        noise,
        texts,
        sigmas,
        chunks,
        cache,
        prefix=image,
        prefix_inside=image is not None,
        cuts=cuts,
        solver="unipc",
    )
    made = torch.cat(list(made), 2)
    if image is not None:
        made = torch.cat([image, made], 2)
    expected = tensors[f"{name}.latents"].transpose(1, 2)
    assert rel(made, expected) < 1e-6

    # The same through what sample.py calls.
    again = generate(
        model,
        noise,
        texts,
        sigmas,
        chunks,
        causal=True,
        solver="unipc",
        guidance=case["guidance"],
        prefix=image,
        window=case["window"],
        sink=case["sink"],
        prefix_inside=image is not None,
        cuts=cuts,
    )
    assert rel(torch.cat(list(again), 2), expected) < 1e-6


@torch.no_grad()
def test_the_vectors_would_notice(model, tensors):
    """Without the gap, or without the frames that a scene keeps, the clip is another one."""
    case = CASES["scene_cut"]
    noise, texts, chunks, cuts, _ = inputs(case, tensors, "scene_cut")
    sigmas = sampling_sigmas(case["steps"], case["shift"])
    expected = tensors["scene_cut.latents"].transpose(1, 2)

    def made(cuts: dict, keep: bool = True) -> torch.Tensor:
        cache = KVCache(model.cfg, 1, case["window"], 6, case["window"], case["sink"])
        out = []
        for x0 in rollout(model, noise, texts, sigmas, chunks, cache, cuts=cuts, solver="unipc"):
            if not keep:
                cache.scenes.clear()
            out.append(x0)
        return torch.cat(out, 2)

    assert rel(made({}), expected) > 1e-2
    assert rel(made(dict.fromkeys(cuts, 0)), expected) > 1e-2
    assert rel(made(cuts, keep=False), expected) > 1e-2

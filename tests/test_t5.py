"""umt5 encoder and tokenizer against the reference's vectors."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from common import gpu
from safetensors import safe_open

from wan5b.extras.texts import encode_prompts
from wan5b.t5 import (
    NEGATIVE_PROMPT,
    T5Config,
    T5Encoder,
    Tokenizer,
    clean_prompt,
    relative_buckets,
)

GOLDEN = Path(__file__).parent / "golden"
SPIECE = GOLDEN / "tokenizer" / "spiece.model"
SEQ_LEN = json.loads((GOLDEN / "tokenizer" / "meta.json").read_text())["seq_len"]
CASES = json.loads((GOLDEN / "tokenizer" / "cases.json").read_text())


def relative_error(x, reference):
    return ((x.float().cpu() - reference).norm() / reference.norm()).item()


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN / "t5.safetensors", "pt") as f:
        config = json.loads(f.metadata()["config"])
        return {key: f.get_tensor(key) for key in f.keys()}, T5Config(**config)


@pytest.fixture(scope="module")
def encoder(golden):
    tensors, cfg = golden
    model = T5Encoder(cfg)
    weights = {key[2:]: value for key, value in tensors.items() if key.startswith("w.")}
    model.load_state_dict(weights)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(SPIECE, SEQ_LEN)


def test_hidden_matches_reference(golden, encoder):
    tensors, _ = golden
    mask = tensors["in.mask"]
    hidden = encoder(tensors["in.ids"], mask)
    error = (hidden[mask.bool()] - tensors["out.hidden_valid"]).abs().max().item()
    print(f"hidden, largest error {error:.1e}")
    assert error < 1e-4
    assert hidden.shape == (*mask.shape, encoder.cfg.dim)
    assert not hidden[mask == 0].any()


def test_buckets_match_reference(golden):
    tensors, cfg = golden
    buckets = relative_buckets(tensors["in.relative_position"], cfg.num_buckets)
    assert torch.equal(buckets, tensors["out.bucket"])


def test_buckets_of_known_distances():
    """8 exact, then two per octave: 16, 32 and 64 begin a bucket; the last takes the rest.

    For later keys 16 more.
    """
    distance = torch.tensor([0, 1, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 511, 10**6])
    expected = torch.tensor([0, 1, 7, 8, 9, 10, 11, 12, 13, 14, 15, 15, 15, 15])
    assert torch.equal(relative_buckets(-distance), expected)
    assert torch.equal(relative_buckets(distance[1:]), expected[1:] + 16)


def test_trimming_changes_no_valid_row(golden, encoder):
    """The same prompts in 40 columns, which the longest fills, and in 90: 50 are padding."""
    ids, mask = golden[0]["in.ids"], golden[0]["in.mask"]
    short = encoder(ids, mask)
    pad = torch.nn.functional.pad
    long = encoder(pad(ids, (0, 50)), pad(mask, (0, 50)))
    torch.testing.assert_close(long[:, : ids.shape[1]], short, atol=1e-5, rtol=0)
    assert not long[:, ids.shape[1] :].any()


def test_padding_is_invisible(golden, encoder):
    """What stands in padded columns, trimmed or not, does not reach a valid row."""
    ids, mask = golden[0]["in.ids"], golden[0]["in.mask"]
    other = torch.where(mask.bool(), ids, 7)
    assert torch.equal(encoder(other, mask), encoder(ids, mask))


def test_batch_equals_singles(golden, encoder):
    ids, mask = golden[0]["in.ids"], golden[0]["in.mask"]
    singles = torch.cat([encoder(ids[i : i + 1], mask[i : i + 1]) for i in range(len(ids))])
    torch.testing.assert_close(encoder(ids, mask), singles, atol=1e-5, rtol=0)


def test_an_empty_mask_gives_zeros(golden, encoder):
    ids, mask = golden[0]["in.ids"], golden[0]["in.mask"]
    assert not encoder(ids, torch.zeros_like(mask)).any()
    one_empty = mask * torch.tensor([[1], [0]])
    assert not encoder(ids, one_empty)[1].any()
    assert torch.isfinite(encoder(ids, one_empty)).all()


def test_bfloat16_weights(golden, encoder):
    """bfloat16 in, bfloat16 out, near the float32 result."""
    tensors, cfg = golden
    model = T5Encoder(cfg).to(torch.bfloat16)
    model.load_state_dict(encoder.state_dict())
    hidden = model(tensors["in.ids"], tensors["in.mask"])
    assert hidden.dtype == torch.bfloat16
    assert relative_error(hidden[tensors["in.mask"].bool()], tensors["out.hidden_valid"]) < 3e-2


def test_names_and_shapes_of_the_release():
    with torch.device("meta"):
        model = T5Encoder(T5Config())
    manifest = json.loads((GOLDEN / "manifest_umt5-xxl.json").read_text())
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == manifest
    assert not list(model.buffers())


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_tokenizer_matches_reference(case, tokenizer):
    assert clean_prompt(case["text"]) == case["cleaned"]
    ids, mask = tokenizer([case["text"]])
    assert ids[0].tolist() == case["ids"]
    assert mask[0].tolist() == [1] * case["mask_sum"] + [0] * (SEQ_LEN - case["mask_sum"])
    assert ids.dtype == mask.dtype == torch.int64


def test_tokenizer_batch(tokenizer):
    ids, mask = tokenizer([case["text"] for case in CASES])
    assert ids.tolist() == [case["ids"] for case in CASES]
    assert mask.sum(1).tolist() == [case["mask_sum"] for case in CASES]


@pytest.mark.parametrize("text", ["😀", "😀ꙮ", "ꙮ😀🫠😀"])
def test_a_run_of_unknown_characters_is_one_unk(text, tokenizer):
    """Without byte fallback, however many bytes and characters; a space ends the run."""
    space, unk = tokenizer.model.piece_to_id("▁"), tokenizer.model.unk_id()
    assert tokenizer.encode(text) == [space, unk]
    assert tokenizer.encode(f"{text} {text}") == [space, unk, space, unk]


def test_characters_that_become_spaces(tokenizer):
    """U+2581, which is a space inside the model, and zero-width spaces are spaces in a prompt."""
    assert tokenizer.encode("a▁▁ b") == tokenizer.encode("a\u200bb") == tokenizer.encode("a b")


def test_names_of_special_tokens_are_text(tokenizer):
    ids = tokenizer.encode("a</s> <pad> <unk>")
    model = tokenizer.model
    assert not {model.eos_id(), model.pad_id(), model.unk_id()} & set(ids)


def test_long_prompt_is_cut_before_the_end_token(tokenizer):
    ids, mask = tokenizer(["word " * 1000])
    assert ids[0, -1] == 1
    assert (ids == 1).sum() == 1
    assert mask.all()


def test_negative_prompt():
    ids, mask = Tokenizer(SPIECE)([NEGATIVE_PROMPT])
    longest_case = CASES[4]["text"]
    assert NEGATIVE_PROMPT.startswith(longest_case)
    assert len(NEGATIVE_PROMPT) == 137
    assert ids.shape == (1, 512)
    assert 50 < mask.sum() < 512
    assert ids[0, mask.sum() - 1] == 1


def test_tokenizer_of_bytes(tokenizer):
    """A text encoder's file may hold its tokenizer."""
    prompts = [case["text"] for case in CASES]
    ids, mask = Tokenizer(SPIECE.read_bytes(), SEQ_LEN)(prompts)
    assert torch.equal(ids, tokenizer(prompts)[0])
    assert torch.equal(mask, tokenizer(prompts)[1])
    for content in (b"", b"{}", SPIECE.read_bytes()[:-1000]):
        with pytest.raises(ValueError, match=f"{len(content)} bytes are no SentencePiece model"):
            Tokenizer(content)


def test_damaged_tokenizers_are_one_line(tmp_path):
    """Where the damage can be seen; the library may quote bytes that are no text."""
    path = tmp_path / "spiece.model"
    errors = []
    for seed in range(80):
        chance = random.Random(seed)
        content = bytearray(SPIECE.read_bytes())
        for _ in range(3):
            content[chance.randrange(200)] = chance.randrange(256)
        path.write_bytes(content)
        try:
            Tokenizer(path)(["a red circle"])
        except ValueError as error:
            errors.append(error)
    assert any(isinstance(error.__cause__, UnicodeDecodeError) for error in errors)
    for error in errors:
        assert "spiece.model: no such file, or no SentencePiece" in str(error)
        assert "\n" not in str(error)


def test_encode_prompts(golden, encoder, tokenizer):
    """Prompts to zero-padded context, by an encoder that knows the ids of the whole tokenizer."""
    model = T5Encoder(dataclasses.replace(encoder.cfg, vocab=len(tokenizer.model)))
    context = encode_prompts(model, tokenizer, ["A cat walks.", ""])
    assert context.shape == (2, SEQ_LEN, encoder.cfg.dim)
    assert not context.requires_grad
    assert (context != 0).any(-1).sum(1).tolist() == [CASES[0]["mask_sum"], 1]


def test_errors(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="shared_pos"):
        T5Config(shared_pos=True)
    with pytest.raises(ValueError, match="no such file"):
        Tokenizer(tmp_path / "spiece.model")
    path = tmp_path / "pointer"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4548313\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        Tokenizer(path)
    for content in (b"", b"{}", b"\n<!doctype html>", SPIECE.read_bytes()[:-1000]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no SentencePiece model"):
            Tokenizer(str(path))
    with pytest.raises(ValueError, match="list of prompts"):
        tokenizer("A cat walks.")


@gpu
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_hidden_on_the_gpu(golden, encoder, dtype, bar):
    tensors, cfg = golden
    model = T5Encoder(cfg).to("cuda", dtype)
    model.load_state_dict(encoder.state_dict())
    mask = tensors["in.mask"]
    hidden = model(tensors["in.ids"].cuda(), mask.cuda()).cpu()
    error = relative_error(hidden[mask.bool()], tensors["out.hidden_valid"])
    print(f"{dtype} on {torch.cuda.get_device_name()}, relative error {error:.1e}")
    assert error < bar
    assert not hidden[mask == 0].any()
    distance = tensors["in.relative_position"].cuda()
    buckets = relative_buckets(distance, cfg.num_buckets)
    assert torch.equal(buckets.cpu(), tensors["out.bucket"])

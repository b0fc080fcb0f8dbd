"""Texts to what the DiT is shown of them."""

import torch
from torch import Tensor

from wan5b.extras.files import note_cut
from wan5b.extras.formats import load_t5, load_tokenizer
from wan5b.t5 import T5Encoder, Tokenizer


def embed(texts: list[str], release: str, length: int, device: str) -> Tensor:
    """Context of the texts, [B, length, D] on the CPU. The encoder is gone afterwards."""
    tokenizer = load_tokenizer(release, length)
    note_cut(tokenizer, texts)
    encoder = load_t5(release, device, torch.bfloat16)
    # One by one: memory does not grow, and no text's bits depend on its company.
    return torch.cat([encode_prompts(encoder, tokenizer, [text]).cpu() for text in texts])


@torch.no_grad()
def encode_prompts(encoder: T5Encoder, tokenizer: Tokenizer, prompts: list[str]) -> Tensor:
    """Prompts -> context [B, length, D] on the encoder's device, zero beyond each prompt."""
    device = encoder.token_embedding.weight.device
    ids, mask = tokenizer(prompts)
    return encoder(ids.to(device), mask.to(device))

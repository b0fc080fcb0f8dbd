"""umt5-xxl text encoder and its tokenizer: prompts -> [B, 512, 4096], zero beyond the prompt.

Shapes: B batch, L tokens, D width, N heads, K head dim. Parameter names are those of the release
file models_t5_umt5-xxl-enc-bf16.pth, so it loads strictly. Weights may be bfloat16 or float32; RMS
statistics, scores and softmax are float32 either way. Papers: umt5 (arXiv 2304.09151), T5 v1.1
(arXiv 2002.05202).
"""

import html
import math
from dataclasses import dataclass
from pathlib import Path

import ftfy
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan5b.util import raise_interrupted

EPS = 1e-6
MAX_DISTANCE = 128  # relative positions beyond it share the last bucket of their sign
# the one that Wan2.2 was released with
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，"
    "最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，"
    "画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，"
    "三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True)
class T5Config:
    """Sizes of the encoder; the defaults are umt5-xxl. dim_attn is a multiple of num_heads."""

    vocab: int = 256384
    dim: int = 4096
    dim_attn: int = 4096
    dim_ffn: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    shared_pos: bool = False

    def __post_init__(self):
        if self.shared_pos:
            raise ValueError("shared_pos=True is T5 and mT5; umt5 has a position table per layer")


def relative_buckets(distance: Tensor, num_buckets: int = 32) -> Tensor:
    """Bucket of each relative position `key - query` (int64, any shape); half of them per sign.

    In a half, the first half is exact and the rest logarithmic up to MAX_DISTANCE. The logarithm is
    float32 and in this order of operations, as in training: 16, 32 and 64 lie on bucket borders.
    """
    half = num_buckets // 2
    exact = num_buckets // 4
    size = distance.abs()
    fraction = torch.log(size.clamp(min=exact).float() / exact) / math.log(MAX_DISTANCE / exact)
    far = exact + (fraction * (half - exact)).long()
    far = far.clamp(max=half - 1)
    return torch.where(size < exact, size, far) + half * (distance > 0)


class Attention(nn.Module):
    """Self-attention without scaling: T5 folds 1 / sqrt(K) into its initialisation."""

    def __init__(self, cfg: T5Config):
        super().__init__()
        self.q = nn.Linear(cfg.dim, cfg.dim_attn, bias=False)
        self.k = nn.Linear(cfg.dim, cfg.dim_attn, bias=False)
        self.v = nn.Linear(cfg.dim, cfg.dim_attn, bias=False)
        self.o = nn.Linear(cfg.dim_attn, cfg.dim, bias=False)

    def forward(self, x: Tensor, padded: Tensor, bias: Tensor) -> Tensor:
        """x [B, L, D], padded [B, 1, 1, L] true at keys to ignore, bias [N, L, L] -> [B, L, D]."""
        heads = (len(bias), -1)
        q = self.q(x).unflatten(-1, heads).transpose(1, 2)  # [B, N, L, K]
        k = self.k(x).unflatten(-1, heads).transpose(1, 2)
        v = self.v(x).unflatten(-1, heads).transpose(1, 2)

        # float32: scores without scaling are large, and bfloat16 would round them by more than the
        # softmax forgives.
        scores = q.float() @ k.float().transpose(-1, -2) + bias  # [B, N, L, L]
        # The most negative finite value, not -inf: a row without any key stays finite.
        scores = scores.masked_fill(padded, torch.finfo(scores.dtype).min)
        weights = scores.softmax(-1).to(v.dtype)
        y = (weights @ v).transpose(1, 2).flatten(2)  # [B, L, N * K]
        return self.o(y)


class FeedForward(nn.Module):
    """fc2(fc1(x) * gelu(gate(x)))."""

    def __init__(self, cfg: T5Config):
        super().__init__()
        gate = nn.Linear(cfg.dim, cfg.dim_ffn, bias=False)
        self.gate = nn.Sequential(gate, nn.GELU(approximate="tanh"))
        self.fc1 = nn.Linear(cfg.dim, cfg.dim_ffn, bias=False)
        self.fc2 = nn.Linear(cfg.dim_ffn, cfg.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x) * self.gate(x))


class Block(nn.Module):
    """One pre-norm layer with its own table of position biases: buckets [L, L] -> [N, L, L]."""

    def __init__(self, cfg: T5Config):
        super().__init__()
        self.norm1 = nn.RMSNorm(cfg.dim, EPS)
        self.norm2 = nn.RMSNorm(cfg.dim, EPS)
        self.attn = Attention(cfg)
        self.ffn = FeedForward(cfg)
        table = nn.Embedding(cfg.num_buckets, cfg.num_heads)
        self.pos_embedding = nn.ModuleDict({"embedding": table})

    def forward(self, x: Tensor, padded: Tensor, buckets: Tensor) -> Tensor:
        bias = self.pos_embedding["embedding"](buckets).permute(2, 0, 1)
        x = x + self.attn(self.norm1(x), padded, bias)
        return x + self.ffn(self.norm2(x))


class T5Encoder(nn.Module):
    """The umt5 encoder. Build it on the meta device: the full size is 5.7 billion parameters."""

    def __init__(self, cfg: T5Config):
        super().__init__()
        self.cfg = cfg
        self.token_embedding = nn.Embedding(cfg.vocab, cfg.dim)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.num_layers))
        self.norm = nn.RMSNorm(cfg.dim, EPS)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids [B, L] int64, mask [B, L] non-zero at tokens -> hidden [B, L, D], zero at padding."""
        # Columns behind the last token are not computed: padding is masked as a key and zeroed as
        # a row, so nobody can tell. A 20-token prompt costs a 25th of L = 512.
        position = torch.arange(ids.shape[1], device=ids.device)
        real = mask != 0
        length = int((real * (position + 1)).max())
        position = position[:length]
        padded = ~real[:, :length]

        distance = position - position[:, None]
        buckets = relative_buckets(distance, self.cfg.num_buckets)  # [length, length]
        x = self.token_embedding(ids[:, :length])
        for block in self.blocks:
            x = block(x, padded[:, None, None], buckets)
        x = self.norm(x).masked_fill(padded[..., None], 0)
        return F.pad(x, (0, 0, 0, ids.shape[1] - length))


def clean_prompt(text: str) -> str:
    """Repair mojibake, undo HTML escapes, leave one space between words."""
    text = ftfy.fix_text(text)
    text = html.unescape(html.unescape(text))  # twice: "&amp;amp;" occurs in web captions
    return " ".join(text.split())


class Tokenizer:
    """Prompts to ids as the reference's fast tokenizer makes them, with sentencepiece alone.

    source: the path of google/umt5-xxl's spiece.model, or its bytes; ValueError if it is missing or
    is something else. Differs from the reference in two rare things: the strings of special tokens
    ("</s>", "<extra_id_0>") in a prompt are ordinary text, and a combining mark right after a
    compatibility character ("½" + U+0301) is an <unk> where the reference drops it.
    """

    def __init__(self, source: str | Path | bytes, length: int = 512):
        try:
            proto = source if isinstance(source, bytes) else Path(source).read_bytes()
            # of no bytes at all the library would make an empty model
            self.model = sentencepiece.SentencePieceProcessor(model_proto=proto or b"?")
        except (OSError, RuntimeError, UnicodeDecodeError) as error:
            raise_interrupted(error)
            if isinstance(source, bytes):
                raise ValueError(f"these {len(source)} bytes are no SentencePiece model") from error
            wrong = "no such file, or no SentencePiece model (LFS pointer? git lfs pull)"
            raise ValueError(f"{source}: {wrong}") from error
        self.length = length

    def encode(self, text: str) -> list[int]:
        """Ids of one cleaned prompt, neither padded nor ended."""
        unk = self.model.unk_id()
        ids = []
        for piece in self.model.encode(text):
            if self.model.is_byte(piece):
                piece = unk
            # a character unknown to the model is several bytes: a run of them is one <unk>
            if piece != unk or ids[-1:] != [unk]:
                ids.append(piece)
        return ids

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """-> ids and mask, both [B, length] int64; id 0 is padding.

        Every prompt is cleaned, cut to length - 1 ids and ended with </s>.
        """
        if isinstance(prompts, str):
            raise ValueError(f"expected a list of prompts, got the single string {prompts[:40]!r}")
        ids = torch.zeros(len(prompts), self.length, dtype=torch.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            tokens = self.encode(clean_prompt(prompt))[: self.length - 1]
            tokens.append(self.model.eos_id())
            row[: len(tokens)] = torch.tensor(tokens)
        mask = (ids != 0).long()  # no token of a prompt is 0
        return ids, mask

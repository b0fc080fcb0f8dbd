"""The arithmetic of wan5b/extras/fp8_attention_kernels.py in plain torch, for CPUs: in float64, but
for the roundings of queries, keys and values.

It takes the place of that file, under the same names.
"""

import torch

from wan5b.attention import attention
from wan5b.extras.fp8_attention import position, round_to_fp8


def round_into(q8, keys, values, first, q, k, v):
    rows = torch.arange(first, first + k.shape[1])
    q8.copy_(round_to_fp8(q))
    keys[:, rows[0] : rows[-1] + 1] = round_to_fp8(k)
    laid = values.view(torch.uint8)
    laid[..., position(rows)] = round_to_fp8(v).permute(0, 2, 3, 1).view(torch.uint8)


def attend(q8, keys, values, length):
    # A tile of the kernel's takes in rows behind the last one, with weights of 0.
    for memory in (keys, values):
        assert memory.float().isfinite().all(), "rows that nothing has written"
    rows = torch.arange(length)
    k = keys[:, :length].double()
    v = values.view(torch.uint8)[..., position(rows)].view(values.dtype).double()
    return attention(q8.double(), k, v.permute(0, 3, 1, 2)).bfloat16()

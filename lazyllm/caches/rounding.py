"""Numbers in 8 or 4 bits: multiples of one scale per vector."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

Bits = Literal[8, 4]


def pack(numbers: Tensor, bits: Bits) -> Tensor:
    """Vectors [..., d] as bytes [..., w]: their codes, then their scale.

    scale s = max |x| / m with m = 127 for 8 bits and 7 for 4; code = round(x / s), in -m .. m; x is read back as
    s * code, so that |error| <= s / 2 for each number, plus the rounding of the vectors' dtype. Two codes of 4 bits
    share a byte. The scale is in float32, of float64 vectors in float64. A vector with NaN or infinite numbers is read
    back with such.

    Source: absmax quantisation, one scale per vector, Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339, section 2.
    """
    exact = numbers.to(torch.promote_types(numbers.dtype, torch.float32))
    scale = (exact.abs().amax(-1) / (2 ** (bits - 1) - 1)).contiguous().unsqueeze(-1)
    codes = (exact / torch.where(scale > 0, scale, 1)).round().to(torch.int8)
    if bits == 4:
        nibbles = pad(codes + 8, (0, codes.shape[-1] % 2)).view(torch.uint8)
        packed = nibbles[..., ::2] | nibbles[..., 1::2] << 4
    else:
        packed = codes.view(torch.uint8)
    return torch.cat([packed, scale.view(torch.uint8)], dim=-1)


def unpack(packed: Tensor, like: Tensor, bits: Bits) -> Tensor:
    """Vectors [..., d] from bytes [..., w]; `like` [..., d] tells their width and dtype."""
    kind = torch.promote_types(like.dtype, torch.float32)
    codes, scale = packed[..., : -kind.itemsize], packed[..., -kind.itemsize :]
    scale = scale.clone(memory_format=torch.contiguous_format).view(kind)
    if bits == 4:
        pairs = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
        signed = pairs[..., : like.shape[-1]].to(torch.int8) - 8
    else:
        signed = codes.view(torch.int8)
    return (signed * scale).to(like.dtype)

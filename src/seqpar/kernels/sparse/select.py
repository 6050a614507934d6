"""What keys are like in two bits a number.

A sketch is meant to rank keys by their scores, not to attend to. It has two bits for each number of a key, spent in
coordinates in which the scores vary independently: keys are turned so that their covariance, as queries weigh it, is
diagonal, and a coordinate gets the more bits the more of the scores' variance it has (reverse water-filling). Queries
of other tokens stand for those that will read the keys. Two bits for each channel as it is lost: on the bundled
checkpoint keys that are looked for then go unnoticed, or noise asks for three times as many others.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from seqpar.kernels.quantize import decode, encode, encoded_width

__all__ = ["decode_sketch", "encode_sketch", "sketch_bytes"]

REACH = (1.6, 1.99, 2.34, 2.68, 3.01, 3.33, 3.65, 3.95)
"""In standard deviations, the half width of the best uniform quantiser of 1 to 8 bits for a normal distribution."""


def sketch_bytes(head_dim: int) -> tuple[int, int]:
    """What the coordinates of a head, and each of its keys, take in a sketch."""
    count = max(1, head_dim // 2)
    return 2 * head_dim + count + count * encoded_width(head_dim, "int8"), -(-2 * head_dim // 8)


def encode_sketch(
    k: Float[Tensor, "n g d"], q: Float[Tensor, "s h d"], kv_head_of: tuple[int, ...]
) -> tuple[UInt8[Tensor, "g bytes"], UInt8[Tensor, "n g code"]]:
    """The coordinates of each head, and each key in them.

    Half as many coordinates as a key has numbers get bits at all; their directions travel in int8, beside the mean key
    in float16 and the number of bits of each.

    Args:
        k: Keys.
        q: Queries, which need not be those that read the keys; without any all directions weigh alike.
        kv_head_of: KV head that each query head reads.
    """
    scales, codes = [], []
    for head in range(k.shape[1]):
        own = q[:, [i for i, read in enumerate(kv_head_of) if read == head]].flatten(0, 1)
        scale, code = _encode_head(k[:, head].double(), own.double())
        scales.append(scale)
        codes.append(code)
    return torch.stack(scales), torch.stack(codes, 1)


def decode_sketch(
    scales: UInt8[Tensor, "g bytes"], codes: UInt8[Tensor, "n g code"], head_dim: int
) -> Float[Tensor, "n g d"]:
    """The keys that stand for those that were encoded, in float32."""
    found = [_decode_head(scale, codes[:, head], head_dim) for head, scale in enumerate(scales)]
    return torch.stack(found, 1)


def _encode_head(k: Float[Tensor, "n d"], q: Float[Tensor, "s d"]) -> tuple[Tensor, Tensor]:
    dim = k.shape[1]
    count, bits = max(1, dim // 2), 2 * dim
    eye = torch.eye(dim, dtype=k.dtype, device=k.device)
    weight = q.T @ q / max(len(q), 1)
    weight = weight + eye * (weight.trace() / dim * 1e-3 + 1e-9)
    values, vectors = torch.linalg.eigh(weight)
    root, inverse = (vectors * power @ vectors.T for power in (values.sqrt(), values.rsqrt()))
    mean = (k.sum(0) / max(len(k), 1)).half()
    centred = k - mean.double()
    spread, axes = torch.linalg.eigh(root @ (centred.T @ centred / max(len(k), 1)) @ root)
    deviation = spread.clamp_min(1e-12).sqrt().flip(0)[:count]
    axes = axes.flip(1)[:, :count]
    shares = _share_out(deviation.tolist(), bits)
    widths = torch.tensor(shares, device=k.device)
    numbers = centred @ root @ axes / deviation
    reach = torch.tensor([REACH[max(share - 1, 0)] for share in shares], dtype=k.dtype, device=k.device)
    codes = ((numbers / reach + 1) * 2.0 ** (widths - 1)).floor().clamp_min(0)
    codes = torch.minimum(codes, 2.0**widths - 1).long()
    coordinate, shift = _places(widths)
    packed = _pack_bits(codes[:, coordinate] >> shift & 1)
    directions = encode(((axes * deviation).T @ inverse).float(), "int8")
    return torch.cat([mean.view(torch.uint8), widths.to(torch.uint8), directions.flatten()]), packed


def _decode_head(scale: UInt8[Tensor, " bytes"], codes: UInt8[Tensor, "n code"], dim: int) -> Float[Tensor, "n d"]:
    count = max(1, dim // 2)
    mean, widths, directions = scale.split([2 * dim, count, count * encoded_width(dim, "int8")])
    widths = widths.long()
    coordinate, shift = _places(widths)
    bits = (codes[..., None] >> torch.arange(8, dtype=torch.uint8, device=codes.device) & 1).flatten(1)
    bits = bits[:, : len(coordinate)].long() << shift
    numbers = torch.zeros(len(codes), count, dtype=torch.int64, device=codes.device).index_add_(1, coordinate, bits)
    reach = torch.tensor(REACH, device=codes.device)[(widths - 1).clamp_min(0)]
    levels: Tensor = ((numbers + 0.5) * 2.0 ** (1 - widths) - 1) * reach * (widths > 0)
    turned = decode(directions.view(count, -1), dim, torch.float32, "int8")
    return torch.addmm(mean.clone().view(torch.float16).float(), levels, turned)


def _share_out(deviations: Sequence[float], bits: int) -> list[int]:
    """Bits for each coordinate: each next one to where the error is largest, of which it leaves about a quarter."""
    found = [0] * len(deviations)
    errors = [(-(deviation**2), at) for at, deviation in enumerate(deviations)]
    heapify(errors)
    for _ in range(min(bits, len(REACH) * len(found))):
        error, at = heappop(errors)
        found[at] += 1
        if found[at] < len(REACH):
            heappush(errors, (error / (2.75 if found[at] == 1 else 4), at))
    return found


def _places(widths: Tensor) -> tuple[Tensor, Tensor]:
    """For each bit of a key its coordinate, and which bit of that one's code it is."""
    coordinate = torch.arange(len(widths), device=widths.device).repeat_interleave(widths)
    first = (widths.cumsum(0) - widths)[coordinate]
    return coordinate, torch.arange(len(coordinate), device=widths.device) - first


def _pack_bits(bits: Tensor) -> UInt8[Tensor, "n bytes"]:
    """[n, bits] as whole bytes, filled up with zeros."""
    eights: Tensor = F.pad(bits, (0, -bits.shape[1] % 8)).unflatten(1, (-1, 8))
    return (eights << torch.arange(8, device=bits.device)).sum(-1).to(torch.uint8)

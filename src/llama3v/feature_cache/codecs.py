"""Codecs: how the values of a record are stored. Features are bf16; `int8` and `fp8` take about half the bytes. What holds
tiles instead of features (mode pixels) is `u8`.

    value = stored value x scale of its token [x scale of its channel]

A record carries its own scales, so nothing is calibrated and every record can be read alone. Each step of encoding and
decoding is one fp32 operation that IEEE 754 rounds exactly: equal features give equal bytes on every machine.

The study behind the choices: benchmarks/codecs.py, with its results in benchmarks/results/.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from llama3v.errors import CacheError

if TYPE_CHECKING:
    import torch

Shape = tuple[int, int, int]
"""(n_tiles, tokens, width) of a record."""

ITEM_BYTES = {"BF16": 2, "F32": 4, "I8": 1, "F8_E4M3": 1, "U8": 1}
ALIGNMENT = 4  # of F32; every record has a multiple of it, so that the scales of the next one are aligned
PART_VALUES = 1 << 17  # values handled at a time: in fp32 they stay in a core's second-level cache
SMALLEST_CHANNEL_SCALE = 2.0**-20  # a channel that small is stored as well as zero; 0 could not be divided by


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a record, as the shard's safetensors header names it.

    Attributes:
        suffix: what its name has after the record's key.
        type: in safetensors' words.
    """

    suffix: str
    type: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.type]


class Codec(ABC):
    """Turns features into the bytes of a record, and back."""

    name: str
    takes: ClassVar[type[np.generic]] = np.uint16
    """What `encode` is given: the bits of finite bf16 values."""
    is_plain: ClassVar[bool] = False
    """Whether the bytes of a record are those of the tensor that it decodes to."""

    @abstractmethod
    def tensors(self, shape: Shape) -> list[StoredTensor]:
        """What a record consists of, in the order of its bytes, without gaps."""

    @abstractmethod
    def encode(self, bits: np.ndarray) -> bytes:
        """The bytes of a record: from `takes` [n_tiles, tokens, width]."""

    @abstractmethod
    def decode(self, data: np.ndarray, shape: Shape, out: np.ndarray | None = None) -> "torch.Tensor":
        """bf16 [n_tiles, tokens, width]: from uint8 [bytes].

        Args:
            out: uint8 [decoded_bytes], memory for the result, if that is not to be new. A plain codec makes no copy: its
                result shares `data`.
        """

    def bytes_of(self, shape: Shape) -> int:
        """Bytes of a record."""
        return sum(tensor.bytes for tensor in self.tensors(shape))

    def decoded_bytes(self, shape: Shape) -> int:
        """Bytes of the tensor that a record decodes to."""
        return math.prod(shape) * np.dtype(self.takes).itemsize

    def as_tensor(self, memory: np.ndarray, shape: Shape) -> "torch.Tensor":
        """The tensor of that shape whose bytes are `memory` (uint8), which it shares."""
        import torch

        return torch.from_numpy(memory).view(torch.uint8 if self.takes is np.uint8 else torch.bfloat16).view(shape)


@dataclass(frozen=True)
class Bf16(Codec):
    """The reference: features as they are."""

    name: str = "bf16"
    is_plain = True

    def tensors(self, shape: Shape) -> list[StoredTensor]:
        return [StoredTensor("", "BF16", shape)]

    def encode(self, bits: np.ndarray) -> bytes:
        return bits.astype("<u2", copy=False).tobytes()

    def decode(self, data: np.ndarray, shape: Shape, out: np.ndarray | None = None) -> "torch.Tensor":
        return self.as_tensor(data, shape)


@dataclass(frozen=True)
class Scaled(Codec):
    """One byte a value, a scale a token and, where `per_channel`, a scale a channel.

    Encoding a record `x` [token, channel]:

        channel_scale[c] = max over tokens of |x[t, c]| / max |x[t]|     (1 where not per channel)
        scale[t]         = max over channels of |x[t, c]| / channel_scale[c], divided by `largest`
        stored[t, c]     = x[t, c] / channel_scale[c] / scale[t], rounded to nearest, ties to even

    A channel's scale is the largest share that it ever has of its token's largest value, hence at most 1. So the step
    between two stored values, scale x channel_scale, is for no value larger than without channel scales, and far
    smaller where a few channels outgrow the rest, as they do in transformers (arXiv 2208.07339).
    """

    name: str
    per_channel: bool
    stored_type: ClassVar[str]
    largest: ClassVar[float]
    """The largest value that is stored."""

    @abstractmethod
    def _quantise(self, values: "torch.Tensor") -> "torch.Tensor":
        """One-byte values of fp32 values within ±largest."""

    @abstractmethod
    def _restore(self, stored: "torch.Tensor", out: "torch.Tensor") -> None:
        """fp32 values of one-byte values (uint8 [n, width]), into `out`."""

    def tensors(self, shape: Shape) -> list[StoredTensor]:
        n_tiles, tokens, width = shape
        padding = -math.prod(shape) % ALIGNMENT  # safetensors allows no holes, so it is a tensor too
        return [
            StoredTensor(".scale", "F32", (n_tiles, tokens)),
            *([StoredTensor(".channel_scale", "F32", (width,))] if self.per_channel else []),
            StoredTensor("", self.stored_type, shape),
            *([StoredTensor(".padding", "U8", (padding,))] if padding else []),
        ]

    def encode(self, bits: np.ndarray) -> bytes:
        import torch

        features = torch.from_numpy(np.require(bits, requirements=["C", "W"])).view(torch.bfloat16)
        data = np.zeros(self.bytes_of(bits.shape), dtype=np.uint8)
        scale, channel_scale, stored = self._views(data, bits.shape)
        rows = features.view(stored.shape)
        if self.per_channel:
            channel_scale.copy_(_channel_scale(rows))
        for part in _parts(stored.shape):
            values = rows[part].float().div_(channel_scale)
            scale[part] = values.abs().amax(1, keepdim=True).div_(self.largest)
            values.div_(_or_one(scale[part])).clamp_(-self.largest, self.largest)
            stored[part] = self._quantise(values).view(torch.uint8)
        return data.tobytes()

    def decode(self, data: np.ndarray, shape: Shape, out: np.ndarray | None = None) -> "torch.Tensor":
        import torch

        scale, channel_scale, stored = self._views(data, shape)
        memory = np.empty(self.decoded_bytes(shape), dtype=np.uint8) if out is None else out
        result = self.as_tensor(memory, shape)
        decoded = result.view(stored.shape)
        buffer = torch.empty(stored.shape[0], stored.shape[1])[: _rows_of_part(stored.shape)]
        for part in _parts(stored.shape):
            values = buffer[: len(stored[part])]
            self._restore(stored[part], values)
            values.mul_(scale[part])
            if self.per_channel:
                values.mul_(channel_scale)
            decoded[part] = values
        return result

    def _views(self, data: np.ndarray, shape: Shape) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
        """Scales [tokens of all tiles, 1] and [width] (ones where not per channel), stored bytes [tokens, width]."""
        import torch

        n_tiles, tokens, width = shape
        rows = n_tiles * tokens
        scales = 4 * (rows + self.per_channel * width)
        numbers = torch.from_numpy(data[:scales].view(np.float32))
        channel_scale = numbers[rows:] if self.per_channel else torch.ones(width)
        stored = torch.from_numpy(data[scales : scales + rows * width])
        return numbers[:rows].view(rows, 1), channel_scale, stored.view(rows, width)


@dataclass(frozen=True)
class Int8(Scaled):
    """Whole numbers from -127 to 127."""

    name: str = "int8"
    per_channel: bool = True
    stored_type = "I8"
    largest = 127.0

    def _quantise(self, values: "torch.Tensor") -> "torch.Tensor":
        import torch

        return values.round_().to(torch.int8)

    def _restore(self, stored: "torch.Tensor", out: "torch.Tensor") -> None:
        import torch

        out.copy_(stored.view(torch.int8))


@dataclass(frozen=True)
class Fp8(Scaled):
    """Floats of 8 bits, e4m3fn: 4 bits of exponent, 3 of mantissa, no infinity (arXiv 2209.05433).

    Every value has an exponent of its own, so channel scales win little.
    """

    name: str = "fp8"
    per_channel: bool = False
    stored_type = "F8_E4M3"
    largest = 448.0

    def _quantise(self, values: "torch.Tensor") -> "torch.Tensor":
        import torch

        return values.to(torch.float8_e4m3fn)

    def _restore(self, stored: "torch.Tensor", out: "torch.Tensor") -> None:
        """torch converts one at a time. Moved into the places of bf16's sign, exponent and mantissa, the bits mean the
        same value times 2^-120, as the exponents' biases are 7 and 127."""
        import torch

        bits = stored.view(torch.int8).to(torch.int16)  # the sign goes to the top
        bits.bitwise_left_shift_(4).bitwise_and_(0x87F0 - 0x10000)
        out.copy_(bits.view(torch.bfloat16)).mul_(2.0**120)


@dataclass(frozen=True)
class U8(Codec):
    """Tiles as they are: `tokens` is the number of pixels of a tile, row by row, and `width` is 3 (RGB)."""

    name: str = "u8"
    takes = np.uint8
    is_plain = True

    def tensors(self, shape: Shape) -> list[StoredTensor]:
        return [StoredTensor("", "U8", shape)]

    def encode(self, bits: np.ndarray) -> bytes:
        return bits.tobytes()

    def decode(self, data: np.ndarray, shape: Shape, out: np.ndarray | None = None) -> "torch.Tensor":
        """uint8 [n_tiles, pixels, 3]."""
        return self.as_tensor(data, shape)


CODECS: dict[str, Codec] = {codec.name: codec for codec in (Bf16(), Int8(), Fp8())}
"""Of features."""
PIXELS = U8()
ALL_CODECS = CODECS | {PIXELS.name: PIXELS}


def codec_named(name: str | None) -> Codec:
    """The codec of that name.

    Raises:
        CacheError: there is none.
    """
    if name not in ALL_CODECS:
        raise CacheError(f"codec {name!r} is unknown; this program has {', '.join(ALL_CODECS)}")
    return ALL_CODECS[name]


def _channel_scale(rows: "torch.Tensor") -> "torch.Tensor":
    """[width]: see `Scaled`. From bf16 [tokens, width]."""
    import torch

    share = torch.zeros(rows.shape[1])
    for part in _parts(rows.shape):
        values = rows[part].float().abs_()
        values.div_(_or_one(values.amax(1, keepdim=True)))
        torch.maximum(share, values.amax(0), out=share)
    return share.clamp_(min=SMALLEST_CHANNEL_SCALE)


def _or_one(scale: "torch.Tensor") -> "torch.Tensor":
    """What to divide by: a token of zeros has scale 0, and stays zero."""
    return scale.masked_fill(scale == 0, 1.0)


def _rows_of_part(shape: tuple[int, ...]) -> int:
    return max(1, PART_VALUES // shape[1])


def _parts(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the rows of [rows, width]."""
    step = _rows_of_part(shape)
    return (slice(start, start + step) for start in range(0, shape[0], step))

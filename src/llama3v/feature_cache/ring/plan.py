"""What an encoder of a ring does next, and whether its bound can work at all."""

from collections.abc import Callable, Container
from dataclasses import dataclass, field

from llama3v.feature_cache.codecs import Codec
from llama3v.feature_cache.ring.claims import Claims
from llama3v.feature_cache.ring.files import Start, WantedImage
from llama3v.feature_cache.ring.stock import Room
from llama3v.feature_cache.ring.wanted import Wanted

SHARD_OVERHEAD = 2 * 4096
"""Bytes of a shard that are not records: its header and its index, rounded up."""
RECORD_OVERHEAD = 64 + 160
"""Bytes of a record's row in the index, and of a tensor's entry in the header."""


@dataclass(frozen=True)
class Sizes:
    """Estimates, slightly too large, of what images take in a ring."""

    codec: Codec
    tokens: int
    width: int
    shard_bytes: int

    def of(self, image: WantedImage) -> int:
        """Bytes of an image's record, with its share of header and index."""
        shape = (image.grid.tiles, self.tokens, self.width)
        return self.codec.bytes_of(shape) + RECORD_OVERHEAD * len(self.codec.tensors(shape))

    def with_shards(self, size: int) -> int:
        """Bytes of the shards that hold records of so many bytes, the last one begun."""
        return size + SHARD_OVERHEAD * (1 + size // self.shard_bytes)


@dataclass
class Round:
    """What to encode next.

    Attributes:
        images: nearest first; all of them fit.
        blocked_at: the first step that lacks an image for which there is no room; None where all is there or under way.
        shared: whether another encoder is at work on an earlier step.
        complete: steps before this one lack nothing.
    """

    images: list[WantedImage] = field(default_factory=list)
    blocked_at: int | None = None
    shared: bool = False
    complete: int = 0


def choose(
    wanted: Wanted,
    first: int,
    present: Container[str],
    failed: Container[str],
    room: Room,
    sizes: Sizes,
    claims: Claims,
    most: int,
) -> Round:
    """The images that steps lack, nearest first, as many as fit, up to about `most` bytes. Their steps are claimed.

    Args:
        first: the first step to look at.
        present: keys that are there. failed: keys that cannot be encoded.
    """
    chosen, total = Round(complete=max(first, wanted.end)), 0
    met: set[str] = set()
    for step, images in wanted.steps(first):
        missing = [
            image for image in images if image.key not in met and image.key not in present and image.key not in failed
        ]
        if not missing:
            continue
        chosen.complete = min(chosen.complete, step)
        met.update(image.key for image in missing)
        if not claims.take(step):
            chosen.shared = True
            room.take(sum(map(sizes.of, missing)))
            continue
        taken = 0
        for image in missing:
            size = sizes.of(image)
            if sizes.with_shards(total + size) > room.for_step(step):
                chosen.blocked_at = step
                break
            chosen.images.append(image)
            total, taken = total + size, taken + 1
        if not taken:
            claims.release(step)
        if chosen.blocked_at is not None or total >= most:
            break
    return chosen


def smallest_bound(wanted: Wanted, start: Start, first_step: int, sizes: Sizes) -> tuple[int, int, int]:
    """(bytes, first step, end): the stretch between two checkpoints, as far as steps are listed, that takes most.

    Nothing of it can be freed before its last step is trained, so a bound must have room for it.
    """
    most = (0, first_step, first_step)
    while first_step < wanted.end:
        end = start.next_checkpoint(first_step)
        images = {image.key: image for _, images in wanted.steps(first_step, end) for image in images}
        most = max(most, (sizes.with_shards(sum(map(sizes.of, images.values()))), first_step, end))
        first_step = end
    return most


def in_words(size: float, unit: Callable[[float], str] = "{:,.1f}".format) -> str:
    """Bytes, for people."""
    for name in ("bytes", "kB", "MB", "GB"):
        if size < 1000 or name == "GB":
            return f"{size:,.0f} bytes" if name == "bytes" else f"{unit(size)} {name}"
        size /= 1000
    raise AssertionError("unreachable")

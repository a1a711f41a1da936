"""The order of an epoch: a pure function of (seed, epoch), the same on every platform and numpy version.

numpy promises the raw bits of its bit generators for ever, but not what `Generator.permutation` makes of them
(NEP 19). So the permutation here is: one 64-bit key per index out of Philox, then a stable sort of the keys.
"""

from collections.abc import Sequence

import numpy as np

from llama3v.errors import ConfigError

_WORD = 2**64


def epoch_order(seed: int, epoch: int, n: int) -> Sequence[int]:
    """A permutation of 0 .. n-1 that depends on nothing but its arguments.

    Every (seed, epoch) is a key of its own of Philox 4x64 (Salmon et al. 2011, "Parallel random numbers: as easy
    as 1, 2, 3"), so the streams of neighbouring seeds and epochs are independent.
    Raises ConfigError for a negative epoch or n.
    """
    if epoch < 0 or n < 0:
        raise ConfigError(f"expected an epoch and a number of samples of 0 or more, found {epoch} and {n}")
    key = np.array([seed % _WORD, epoch % _WORD], dtype=np.uint64)
    bits = np.random.Philox(key=key).random_raw(n)
    return np.argsort(bits, kind="stable").tolist()

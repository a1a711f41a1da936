"""llama.cpp's `llama_batch`, filled in place: its arrays are numpy's, made once, and no pass allocates anything."""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int8, c_int32
from typing import Any

import numpy as np


class BatchStructure(ctypes.Structure):
    """llama_batch of include/llama.h. It has either tokens or embeddings."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


class Batch:
    """Room for `size` tokens or embeddings, each of one sequence."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._tokens, self._positions, self._sequences = (np.zeros(size, np.int32) for _ in range(3))
        self._wanted = np.zeros(size, np.int8)
        self._one_each = np.ones(size, np.int32)
        self._pointers = self._sequences.ctypes.data + 4 * np.arange(size, dtype=np.uintp)  # to each one's sequence
        self._embeddings: np.ndarray | None = None  # kept while the library may read it
        self._structure = BatchStructure(
            pos=_pointer(self._positions, c_int32),
            n_seq_id=_pointer(self._one_each, c_int32),
            seq_id=_pointer(self._pointers, POINTER(c_int32)),
            logits=_pointer(self._wanted, c_int8),
        )
        self._token_pointer = _pointer(self._tokens, c_int32)

    def tokens(self, ids: Sequence[int]) -> None:
        """What is read: these tokens."""
        self._tokens[: len(ids)] = ids
        self._structure.n_tokens = len(ids)
        self._structure.token, self._structure.embd = self._token_pointer, None

    def embeddings(self, rows: np.ndarray) -> None:
        """What is read: these embeddings [n, hidden]."""
        self._embeddings = np.ascontiguousarray(rows, np.float32)
        self._structure.n_tokens = len(rows)
        self._structure.token, self._structure.embd = None, _pointer(self._embeddings, c_float)

    def places(self, positions: Any, sequences: Any) -> None:
        """Where each stands, after `tokens` or `embeddings`: arrays or lists of their length, or a number for all."""
        count = self._structure.n_tokens
        self._positions[:count] = positions
        self._sequences[:count] = sequences

    def want(self, logits: Any) -> BatchStructure:
        """After which logits are wanted: an array of 0 and 1, or one for all. The structure for `llama_decode`."""
        self._wanted[: self._structure.n_tokens] = logits
        return self._structure


def _pointer(array: np.ndarray, kind: Any) -> Any:
    return ctypes.cast(array.ctypes.data, POINTER(kind))

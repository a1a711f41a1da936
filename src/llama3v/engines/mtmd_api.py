"""llama.cpp's own vision (mtmd): tiles through an mmproj.gguf, as stock programs run it.

Interface: tools/mtmd/mtmd.h of ggml-org/llama.cpp, out of the library that engines/llama_api.py opens. No torch here.
"""

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int32, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from llama3v.engines import llama_api
from llama3v.errors import CheckpointError

_IMAGE_CHUNK = 1  # enum mtmd_input_chunk_type


class _Params(ctypes.Structure):
    _fields_ = (
        ("use_gpu", c_uint8 * 8),
        ("word", c_uint64),
        ("print_timings", c_uint8 * 4),
        ("n_threads", c_int32),
        ("rest", c_uint64 * 9),
    )


class _Text(ctypes.Structure):
    _fields_ = (("text", c_char_p), ("add_special", c_bool), ("parse_special", c_bool))


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "mtmd_context_params_default": (_Params, []),
    "mtmd_init_from_file": (c_void_p, [c_char_p, c_void_p, _Params]),
    "mtmd_free": (None, [c_void_p]),
    "mtmd_log_set": (None, [c_void_p, c_void_p]),
    "mtmd_helper_log_set": (None, [c_void_p, c_void_p]),
    "mtmd_default_marker": (c_char_p, []),
    "mtmd_bitmap_init": (c_void_p, [c_uint32, c_uint32, c_void_p]),
    "mtmd_bitmap_free": (None, [c_void_p]),
    "mtmd_input_chunks_init": (c_void_p, []),
    "mtmd_input_chunks_free": (None, [c_void_p]),
    "mtmd_input_chunks_size": (c_size_t, [c_void_p]),
    "mtmd_input_chunks_get": (c_void_p, [c_void_p, c_size_t]),
    "mtmd_input_chunk_get_type": (c_int32, [c_void_p]),
    "mtmd_input_chunk_get_n_tokens": (c_size_t, [c_void_p]),
    "mtmd_tokenize": (c_int32, [c_void_p, c_void_p, POINTER(_Text), POINTER(c_void_p), c_size_t]),
    "mtmd_encode_chunk": (c_int32, [c_void_p, c_void_p]),
    "mtmd_get_output_embd": (POINTER(c_float), [c_void_p]),
}


class Mtmd:
    """The vision half of a GGUF pair, for an opened language model. Raises CheckpointError where it does not load."""

    def __init__(self, path: Path, llm: llama_api.Llama) -> None:
        self._context: int | None = None
        llama_api.require_gguf(path)
        self._lib = llama_api.library()
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._lib, name)
            function.restype, function.argtypes = result, arguments
        for name in ("mtmd_log_set", "mtmd_helper_log_set"):
            getattr(self._lib, name)(llama_api.listener(), None)
        self._llm = llm
        params = self._lib.mtmd_context_params_default()
        params.use_gpu[0] = params.print_timings[0] = 0
        params.n_threads = llama_api.cores()
        self._context = self._lib.mtmd_init_from_file(str(path).encode(), llm.handle, params)
        if not self._context:
            raise CheckpointError(f"llama.cpp cannot load the vision tower {path}; export the model again")

    def encode(self, tile: np.ndarray) -> np.ndarray:
        """uint8 [S, S, 3], a tile of the size the tower takes -> visual tokens float32 [tokens, hidden].

        mtmd may put slices of its own after the overview; the overview is the first image chunk.
        """
        tile = np.ascontiguousarray(tile)
        bitmap = self._lib.mtmd_bitmap_init(tile.shape[1], tile.shape[0], tile.ctypes.data)
        chunks = self._lib.mtmd_input_chunks_init()
        try:
            text = _Text(self._lib.mtmd_default_marker(), False, True)
            bitmaps = (c_void_p * 1)(bitmap)
            status = self._lib.mtmd_tokenize(self._context, chunks, ctypes.byref(text), bitmaps, 1)
            if status != 0:
                raise CheckpointError(f"llama.cpp cannot prepare a tile of {tile.shape} (status {status})")
            image = next(chunk for chunk in self._chunks(chunks) if self._is_image(chunk))
            if self._lib.mtmd_encode_chunk(self._context, image) != 0:
                raise CheckpointError("llama.cpp's vision failed on a tile; export the model again")
            shape = (self._lib.mtmd_input_chunk_get_n_tokens(image), self._llm.hidden)
            return np.ctypeslib.as_array(self._lib.mtmd_get_output_embd(self._context), shape).copy()
        finally:
            self._lib.mtmd_input_chunks_free(chunks)
            self._lib.mtmd_bitmap_free(bitmap)

    def _chunks(self, chunks: int) -> list[int]:
        return [self._lib.mtmd_input_chunks_get(chunks, n) for n in range(self._lib.mtmd_input_chunks_size(chunks))]

    def _is_image(self, chunk: int) -> bool:
        return self._lib.mtmd_input_chunk_get_type(chunk) == _IMAGE_CHUNK

    def close(self) -> None:
        """Give the memory back; also done when this object goes away."""
        if self._context:
            self._lib.mtmd_free(self._context)
        self._context = None

    def __del__(self) -> None:
        self.close()

"""llama.cpp's C interface, out of the shared library that the wheel `xllamacpp` carries.

No binding on PyPI with ready wheels takes embeddings as input; this library exports the C functions that do. That is
incidental, so the extra pins its version, and what is here is checked before use: the default parameters must be those
that are known, and a context must have the sizes it was asked for.

Interface: include/llama.h of ggml-org/llama.cpp. No torch here.
"""

import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int32, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from llama3v.engines.llama_batch import Batch, BatchStructure
from llama3v.errors import CheckpointError, ConfigError, PromptError

VERSION = "2026.10.11549"
KV_TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "q4_0": 2}
"""Type of the KV cache -> its number in ggml.h."""
MOST_CONTEXT = 8192  # tokens, unless more is asked for
_BATCH = 512  # tokens in one pass: its default for the physical batch
SHARED_BATCH = 128
"""Tokens in one pass where there are several sequences: while one's prompt is read, the others wait for that long. Their
attention is not fused, whose scores take memory in proportion."""


class _ModelParams(ctypes.Structure):
    """Passed on as it comes: the defaults are right on every machine."""

    _fields_ = (("words", c_uint64 * 10),)


class _ContextParams(ctypes.Structure):
    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("before_threads", c_uint32 * 3),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("context_type", c_int32),
        ("rope_pooling_attention", c_int32 * 3),
        ("flash_attention", c_int32),  # -1 auto, 0 off, 1 on
        ("rope_and_yarn", c_uint32 * 8),
        ("eval_callback", c_void_p * 2),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("abort_and_more", c_void_p * 3),
        ("switches", c_uint8 * 8),
        ("samplers", c_uint64 * 3),
    )


class _Room(ctypes.Structure):
    """More room than any structure of parameters needs: to look at one before its size is trusted."""

    _fields_ = (("bytes", c_uint8 * 2048),)


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [c_void_p, c_void_p]),
    "llama_model_load_from_file": (c_void_p, [c_char_p, _ModelParams]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_model_n_ctx_train": (c_int32, [c_void_p]),
    "llama_model_n_embd": (c_int32, [c_void_p]),
    "llama_model_meta_val_str": (c_int32, [c_void_p, c_char_p, c_char_p, c_size_t]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_init_from_model": (c_void_p, [c_void_p, _ContextParams]),
    "llama_free": (None, [c_void_p]),
    "llama_n_ctx": (c_uint32, [c_void_p]),
    "llama_n_batch": (c_uint32, [c_void_p]),
    "llama_n_seq_max": (c_uint32, [c_void_p]),
    "llama_n_threads": (c_int32, [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
    "llama_memory_seq_cp": (None, [c_void_p, c_int32, c_int32, c_int32, c_int32]),
    "llama_decode": (c_int32, [c_void_p, BatchStructure]),
    "llama_get_logits": (c_void_p, [c_void_p]),
    "ggml_quantize_chunk": (
        c_size_t,
        [c_int32, c_void_p, c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, c_void_p],
    ),
    "ggml_row_size": (c_size_t, [c_int32, ctypes.c_int64]),
}

_complaints: list[str] = []  # what the library said since it was last asked to load something


@ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)
def _listen(level: int, text: bytes, _: Any) -> None:
    """It writes pages to stderr. Keep errors only, for the message of ours."""
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        _complaints.append(text.decode("utf-8", "replace").strip())


def listener() -> Any:
    """A callback for the library's log, which keeps errors and drops the rest."""
    return _listen


def library_path() -> Path:
    """The shared library; ConfigError, naming the extra, where it is not installed. Cheap."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None or found.origin is None:
        raise ConfigError("llama.cpp is not installed (there is no module xllamacpp): pip install 'llama3v[llamacpp]'")
    libraries = sorted(Path(found.origin).parent.glob("xllamacpp*.so")) + sorted(
        Path(found.origin).parent.glob("*.pyd")
    )
    if not libraries:
        raise _other_interface("no shared library in it")
    return libraries[0]


@functools.cache
def library() -> Any:
    """The library with its functions declared, after a look at whether it is the one that is known."""
    try:
        loaded = ctypes.CDLL(str(library_path()))
    except OSError as error:
        raise ConfigError(f"llama.cpp cannot be loaded on this machine: {error}") from error
    try:
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
        _check_defaults(loaded)
    except AttributeError as error:
        raise _other_interface(f"no function {error.name or error}") from error
    loaded.llama_backend_init()
    loaded.llama_log_set(_listen, None)
    return loaded


def _check_defaults(loaded: Any) -> None:
    """The default parameters must lie where `_ContextParams` has them; they are read into more room than they need."""
    function = loaded.llama_context_default_params
    function.restype, function.argtypes = _Room, []
    found = _ContextParams.from_buffer_copy(bytes(function()))
    known = (512, 2048, 512, 1, -1, 1, 1)
    values = (
        found.n_ctx,
        found.n_batch,
        found.n_ubatch,
        found.n_seq_max,
        found.flash_attention,
        found.type_k,
        found.type_v,
    )
    if values != known:
        raise _other_interface(f"default parameters {values}")
    function.restype = _ContextParams
    loaded.llama_model_default_params.restype, loaded.llama_model_default_params.argtypes = _ModelParams, []


def _other_interface(what: str) -> ConfigError:
    return ConfigError(
        f"expected xllamacpp {VERSION}, found one with another C interface ({what}): pip install xllamacpp=={VERSION}"
    )


def require_gguf(path: Path) -> None:
    """CheckpointError where there is no file, or another kind of file, at `path`."""
    if not path.is_file():
        raise CheckpointError(f"no GGUF file at {path}; write one with `llama3v export --format gguf`")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file (it begins with {magic!r}); give one that llama.cpp reads")


class Llama:
    """One language model with the KV caches of a few sequences.

    Args:
        path: a GGUF file.
        context_tokens: places in each KV cache; default: what the model was trained for, at most 8192.
        kv: type of the KV cache, a key of `KV_TYPES`.
        threads: default: the cores that this process may use.
        sequences: KV caches, numbered from 0. Where there are several, attention is not fused in caches of 16 or 32 bits: the
            fused one rounds differently in other passes (engines/llama_group.py).

    Raises:
        ConfigError: the library is absent or another than the known one, or `kv` is none of the types.
        CheckpointError: the file is damaged, or of another kind.
    """

    def __init__(
        self,
        path: Path,
        *,
        context_tokens: int | None = None,
        kv: str = "f16",
        threads: int | None = None,
        sequences: int = 1,
    ) -> None:
        self._model: int | None = None
        self._context: int | None = None
        # Where many threads ask, one computes. libgomp keeps workers for every thread that has computed; once there are more of
        # them than cores, waiting workers sleep instead of spinning, and a pass takes a quarter longer.
        self._thread = ThreadPoolExecutor(1, "llama.cpp") if sequences > 1 else None
        if kv not in KV_TYPES:
            raise ConfigError(f"expected a KV cache in one of {', '.join(KV_TYPES)}, found {kv} (--kv)")
        require_gguf(path)
        self._lib = library()
        _complaints.clear()
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), self._lib.llama_model_default_params())
        if not self._model:
            reason = next((line for line in _complaints if line), "it gave no reason")
            raise CheckpointError(f"llama.cpp cannot load {path}, which is damaged or no language model: {reason}")
        self._vocabulary = self._lib.llama_model_get_vocab(self._model)
        self.vocabulary: int = self._lib.llama_vocab_n_tokens(self._vocabulary)
        self.hidden: int = self._lib.llama_model_n_embd(self._model)
        self.trained_tokens: int = self._lib.llama_model_n_ctx_train(self._model)
        self.context_tokens = min(context_tokens or MOST_CONTEXT, self.trained_tokens)
        self._open_context(kv, threads or cores(), sequences)

    def _open_context(self, kv: str, threads: int, sequences: int) -> None:
        params = self._lib.llama_context_default_params()
        # The library rounds a context up to a multiple of 256; what exceeds `context_tokens` is padding's (llama_group.py)
        several = sequences > 1
        params.n_ctx = -(-(self.context_tokens + several) // 256) * 256 * sequences
        params.n_seq_max = sequences  # each gets its share of n_ctx
        params.n_batch = params.n_ubatch = min(SHARED_BATCH if several else _BATCH, params.n_ctx)
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = KV_TYPES[kv]
        # quantised values need it
        params.flash_attention = {"f32": 0, "f16": 0 if several else -1}.get(kv, 1)
        wanted = (params.n_ctx, params.n_batch, sequences, threads)
        _complaints.clear()
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            reason = next((line for line in _complaints if line), "it gave no reason")
            raise ConfigError(
                f"llama.cpp cannot open a context of {self.context_tokens} tokens with a KV cache in {kv} for this "
                f"model ({reason}); take a smaller --context or --kv f16"
            )
        found = tuple(
            getattr(self._lib, f"llama_n_{name}")(self._context) for name in ("ctx", "batch", "seq_max", "threads")
        )
        if found != wanted:
            raise _other_interface(f"a context of {found} instead of {wanted}")
        self._batch = Batch(params.n_batch)
        self._memory = self._lib.llama_get_memory(self._context)

    @property
    def handle(self) -> int | None:
        """The C interface's pointer to the model."""
        return self._model

    def forget(self, keep: int = 0, *, sequence: int = 0) -> None:
        """Drop everything from position `keep` on."""
        self._lib.llama_memory_seq_rm(self._memory, sequence, keep, -1)

    def read(
        self, position: int, new: Sequence[int] | np.ndarray, *, all_logits: bool = False, sequence: int = 0
    ) -> np.ndarray:
        """Feed token ids, or embeddings float32 [n, hidden], at `position` of a sequence on.

        Returns:
            logits of the token after the last one [vocabulary]; with `all_logits` after each [n, vocabulary].

        Raises:
            PromptError: they do not fit into the context. CheckpointError: llama.cpp fails.
        """
        if position + len(new) > self.context_tokens:
            raise PromptError(
                f"expected at most {self.context_tokens} tokens (the context), found {position + len(new)}; ask with "
                "fewer images, fewer turns or a shorter answer"
            )
        parts = []
        for start in range(0, len(new), self._batch.size):
            part = new[start : start + self._batch.size]
            positions = position + start + np.arange(len(part), dtype=np.int32)
            wanted = np.arange(len(part)) >= (0 if all_logits else len(part) - 1)
            parts.append(self.decode(part, positions, sequence, wanted).copy())  # the next pass writes over it
        return np.concatenate(parts) if all_logits else parts[-1][0]

    def decode(self, new: Sequence[int] | np.ndarray, positions: Any, sequences: Any, wanted: Any = 1) -> np.ndarray:
        """One pass over token ids, or embeddings float32 [n, hidden], of one or more sequences.

        Args:
            positions, sequences: of each; an array, a list, or a number for all.
            wanted: whether logits are wanted after each; likewise.

        Returns:
            logits [those wanted, vocabulary], in order: the library's own memory, which the next pass writes over.

        Raises CheckpointError: llama.cpp fails. Nobody knows then what its caches hold: `forget`.
        """
        batch = self._batch
        batch.embeddings(new) if isinstance(new, np.ndarray) else batch.tokens(new)
        batch.places(positions, sequences)
        status = self._in_its_thread(self._lib.llama_decode, self._context, batch.want(wanted))
        if status != 0:
            raise CheckpointError(f"llama.cpp failed to read {len(new)} tokens (status {status})")
        rows = len(new) if isinstance(wanted, int) else int(np.count_nonzero(wanted))
        address = self._lib.llama_get_logits(self._context)
        found = (c_float * (rows * self.vocabulary)).from_address(address)
        return np.frombuffer(memoryview(found), np.float32).reshape(rows, self.vocabulary)

    def _in_its_thread(self, function: Callable[..., int], *arguments: Any) -> int:
        if self._thread is None:
            return function(*arguments)
        called = self._thread.submit(function, *arguments)
        try:
            return called.result()
        except BaseException:  # an interrupt: nothing may touch the context before the pass has ended
            wait([called])
            raise

    def copy(self, source: int, target: int) -> None:
        """Let one sequence's cache hold what another's does. The library copies it before the next pass."""
        self._lib.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def tokenise(self, text: str) -> list[int]:
        """Ids of a text as stock programs make them, control tokens read as such."""
        data = text.encode()
        ids = (c_int32 * (len(data) + 8))()
        count = self._lib.llama_tokenize(self._vocabulary, data, len(data), ids, len(ids), False, True)
        return list(ids[: max(count, 0)])

    def close(self) -> None:
        """Give the memory back; also done when this object goes away."""
        if self._thread is not None:
            self._thread.shutdown(wait=False)
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

    def __del__(self) -> None:
        self.close()


def quantise(values: np.ndarray, ggml_type: int) -> np.ndarray:
    """float32 [rows, columns] -> uint8 [rows, bytes of a row] in one of ggml's types, by ggml's own code."""
    values = np.ascontiguousarray(values, np.float32)
    rows, columns = values.shape
    result = np.empty((rows, library().ggml_row_size(ggml_type, columns)), np.uint8)
    written = library().ggml_quantize_chunk(ggml_type, values.ctypes.data, result.ctypes.data, 0, rows, columns, None)
    if written != result.nbytes:
        raise ConfigError(
            f"expected {result.nbytes} bytes from ggml's quantiser, found {written}; take another --weights"
        )
    return result


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)

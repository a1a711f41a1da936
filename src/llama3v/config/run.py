"""Options of the verbs that run, export and serve a model."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, Suppress, arg

from llama3v.config.base import MaybeInt, MaybePath, MaybeText, bytes, is_default, is_name, option, require

Weights = Literal["f32", "f16", "bf16", "q8_0", "q4_k_m", "int8", "int4"]
Detail = Literal["low", "high"]
Runtime = Literal["torch", "llamacpp", "mlx", "auto"]
AnswerWeights = Literal["full", "int8", "int4"]
KvType = Literal["f32", "f16", "q8_0", "q4_0"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen out of a model's logits; every engine does it alike (engines/sampling.py).

    In this order: repetition penalty, temperature, top-k, top-p, min-p, then a draw; with temperature 0 the likeliest.
    """

    temperature: float = 0.0
    """0 is greedy; higher values sample."""
    top_k: int = 0
    """Sample among this many of the likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the likeliest one's probability."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that stand in the prompt or the answer become less likely (arXiv 1909.05858)."""
    seed: int = 0
    """Seed of the sampling."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these texts."""
    logprobs: Annotated[int | None, Suppress] = None
    """For programs: log-probabilities of each token and of this many alternatives; None: none."""
    json_schema: Annotated[str | None, Suppress] = None
    """For programs: the answer is JSON that obeys this schema, unless it is cut off by its length; None: any text."""

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            require(math.isfinite(value), f"{option(name)} is {value}; give a number")
        require(self.temperature >= 0, f"--temperature is {self.temperature}; give 0 or more")
        require(self.top_k >= 0, f"--top-k is {self.top_k}; give 0 (all) or more")
        require(0 < self.top_p <= 1, f"--top-p is {self.top_p}; give more than 0, at most 1")
        require(0 <= self.min_p < 1, f"--min-p is {self.min_p}; give 0 or more, below 1")
        require(self.repetition_penalty > 0, f"--repetition-penalty is {self.repetition_penalty}; give more than 0")
        require(self.seed >= 0, f"--seed is {self.seed}; give 0 or more")
        require(all(self.stop), "--stop has an empty text; give texts of one character or more")
        require(self.logprobs is None or self.logprobs >= 0, f"logprobs is {self.logprobs}; give 0 or more")

    @property
    def sampling(self) -> "Sampling":
        """These alone, of options that have more."""
        return Sampling(**{field.name: getattr(self, field.name) for field in fields(Sampling)})


MaybeRuntime = Annotated[Runtime | None, arg(metavar="{torch,llamacpp,mlx,auto}", help_behavior_hint="")]
MaybeKv = Annotated[KvType | None, arg(metavar="{f32,f16,q8_0,q4_0}", help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True)
class Running:
    """On what a trained model runs."""

    engine: MaybeRuntime = None
    """torch, llamacpp (a GGUF pair) or mlx (Apple). auto measures those that can run the model and says which is
    fastest. Without it: llamacpp for a GGUF pair, else torch."""
    weights: AnswerWeights = "full"
    """Hold the LLM's matrices in 8 or 4 bits: less memory, other answers. full: as they are."""
    kv: MaybeKv = None
    """llamacpp: type of the KV cache (default: f16). q8_0 takes half of its memory, q4_0 a quarter."""
    context: MaybeInt = None
    """llamacpp: most tokens of a conversation (default: what the model was trained for, at most 8192)."""


@dataclass(frozen=True)
class AskConfig(Sampling, Running):
    """Ask a question about one or more images; the answer streams to the terminal.

    Examples:
        llama3v ask photo.jpg "What is on the table?" --model runs/quickstart
        llama3v ask before.png after.png "What changed?" --model runs/quickstart
        llama3v ask photo.jpg "What is it?" --model runs/quickstart --detail low --json
    """

    inputs: Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGE... QUESTION", help_behavior_hint="(required)")]
    """Image files, then the question (the last argument)."""
    model: str = "runs/quickstart"
    """A Llama 3-V model directory or hub name."""
    max_new_tokens: int = 256
    """Most tokens in the answer."""
    out: MaybePath = None
    """Directory for summary.json (the question, the answer, timings)."""
    detail: Detail = "high"
    """high: an overview of each image and slices of large ones. low: the overview only, which is several times
    faster and misses small print."""
    json: Annotated[bool, FlagCreatePairsOff] = False
    """Print one JSON object instead of the text: answer, tokens, timings; or what went wrong."""

    def __post_init__(self) -> None:
        require(len(self.inputs) >= 1, 'give image files and a question: llama3v ask photo.jpg "What is it?"')
        require(self.max_new_tokens >= 1, f"--max-new-tokens is {self.max_new_tokens}; give 1 or more")
        super().__post_init__()


@dataclass(frozen=True)
class ChatConfig(Sampling, Running):
    """Talk about images, turn by turn. `/image FILE` adds a picture, `/reset` starts anew, `/quit` leaves.

    Example:
        llama3v chat photo.jpg --model runs/quickstart
    """

    images: Annotated[Positional[tuple[str, ...]], arg(metavar="[IMAGE...]", help_behavior_hint="")] = ()
    """Image files the first question is about."""
    model: str = "runs/quickstart"
    """A Llama 3-V model directory or hub name."""
    max_new_tokens: int = 256
    """Most tokens in an answer."""
    detail: Detail = "high"
    """high: an overview of each image and slices of large ones. low: the overview only."""

    def __post_init__(self) -> None:
        require("-" not in self.images, "chat reads questions from stdin, so no image can come from there; name a file")
        require(self.max_new_tokens >= 1, f"--max-new-tokens is {self.max_new_tokens}; give 1 or more")
        super().__post_init__()


@dataclass(frozen=True)
class CaptionConfig(Running):
    """Caption an image, or every image of a folder (resumable: captions that exist are kept).

    Examples:
        llama3v caption photo.jpg --model runs/quickstart
        llama3v caption holiday/ --model runs/quickstart --out captions --format csv
        llama3v caption holiday/ --model runs/quickstart --sidecar
    """

    inputs: Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGE|FOLDER...", help_behavior_hint="(required)")]
    """Image files or folders; - reads one image from stdin."""
    model: str = "runs/quickstart"
    """A Llama 3-V model directory or hub name."""
    prompt: str = "Describe the image."
    """What the model is asked."""
    out: MaybePath = None
    """Directory for captions.jsonl and summary.json."""
    max_new_tokens: int = 96
    """Most tokens in a caption."""
    format: Literal["jsonl", "csv"] = "jsonl"
    """With --out. jsonl: captions.jsonl alone, which grows with every batch. csv: at the end also captions.csv."""
    sidecar: Annotated[bool, FlagCreatePairsOff] = False
    """Write the caption of photo.jpg to photo.txt beside it, as training tools read captions. A photo.txt that is
    there already is kept, and its image counts as captioned."""
    detail: Detail = "high"
    """high: an overview of each image and slices of large ones. low: the overview only, which is several times
    faster and misses small print."""
    json: Annotated[bool, FlagCreatePairsOff] = False
    """Print one JSON object at the end instead of a line per image: captions, counts, seconds; or what went wrong."""

    def __post_init__(self) -> None:
        require(len(self.inputs) >= 1, "give image files or folders: llama3v caption photo.jpg")
        require(self.inputs.count("-") <= 1, 'give "-" once: stdin holds one image; name the others as files')
        require(
            "-" not in self.inputs or not self.sidecar, "--sidecar needs files: an image from stdin has none beside it"
        )
        require(self.max_new_tokens >= 1, f"--max-new-tokens is {self.max_new_tokens}; give 1 or more")
        require(self.format == "jsonl" or self.out is not None, f"--format {self.format} needs a directory: --out DIR")


@dataclass(frozen=True)
class ExportConfig:
    """Write a trained model in a stock form that other programs load without this package.

    Examples:
        llama3v export --model runs/quickstart --format hf --out exported
        llama3v export --model runs/quickstart --format gguf --weights q8_0 --out exported-gguf
        llama3v export --model runs/quickstart --format openvino --out exported-vision
    """

    out: Path
    """Directory to write."""
    model: str = "runs/quickstart"
    """A Llama 3-V model directory or hub name."""
    format: Literal["hf", "gguf", "mlx", "openvino", "onnx"] = "hf"
    """hf: a directory for transformers (and what reads its layout). gguf: a pair of files for llama.cpp and
    Ollama. mlx: a directory for mlx-vlm on Macs. openvino, onnx: vision tower and projector as one model of these
    runtimes."""
    program: Literal["transformers", "vllm"] = "transformers"
    """hf: whose reading of patch positions is served. transformers also fits mlx-vlm; vLLM checks the size of a tile
    against the table of positions, and needs it without the border that the others need."""
    form: Literal["idefics3", "smolvlm"] = "smolvlm"
    """hf: which stock architecture. smolvlm keeps our prompt (framing tokens are configured empty); idefics3
    adds its own framing in its processor."""
    weights: Annotated[Weights | None, arg(help_behavior_hint="")] = None
    """gguf: type of the language model's matrices. mlx: f32, f16, bf16, int8 or int4. openvino, onnx: f32 or f16.
    (Default: as they lie on disk.)"""
    tower: Literal["auto", "openvino", "onnx", "none"] = "auto"
    """gguf: add vision tower and projector as a model of that runtime, with which `ask` needs no PyTorch. auto: of
    OpenVINO where it is installed, else of ONNX Runtime where that is, else none."""
    check: Annotated[bool, arg()] = True
    """Compare features, logits and greedy tokens with this package's before the export is called done."""

    def __post_init__(self) -> None:
        for name, formats in (("form", ("hf",)), ("program", ("hf",)), ("tower", ("gguf",))):
            require(
                self.format in formats or is_default(self, name),
                f"--{name} has no meaning for --format {self.format}",
            )
        offered: dict[str, tuple[str, ...]] = {
            "hf": (),
            "gguf": ("f32", "f16", "bf16", "q8_0", "q4_k_m"),
            "mlx": ("f32", "f16", "bf16", "int8", "int4"),
        }
        choices = offered.get(self.format, ("f32", "f16"))
        require(
            self.weights is None or self.weights in choices,
            f"--weights {self.weights} has no meaning for --format {self.format}; "
            + (f"give one of {', '.join(choices)}" if choices else "leave it away"),
        )


@dataclass(frozen=True)
class ServeConfig(Running):
    """Serve a model through the API that OpenAI's clients speak, with a page to try it at `/`.

    Only this machine can reach it, unless --host says otherwise; then every request needs a key.

    Examples:
        llama3v serve runs/quickstart
        llama3v serve exported-gguf --port 8080 --warmup
        llama3v serve --make-key workshop
        llama3v serve runs/stage2 --host 0.0.0.0 --config serve.toml
    """

    model: Positional[str] = "runs/quickstart"
    """A Llama 3-V model directory, a GGUF pair of `llama3v export`, or a hub name."""
    host: str = "127.0.0.1"
    """Address to listen on. Any other than this machine's own needs keys in --config."""
    port: int = 8000
    """Port to listen on; 0: a free one, which is printed."""
    name: MaybeText = None
    """The model's name in the API (default: the last part of `model`)."""
    config: MaybePath = None
    """TOML file with any of these options, and the keys. What the command line gives wins."""
    make_key: MaybeText = None
    """Make a key of this name, print it and its lines for the config file, and leave."""
    parallel: int = 2
    """Answers in work at the same time; each has a KV cache of its own."""
    queue: int = 64
    """Requests that may wait; more are refused with status 429."""
    max_connections: int = 512
    """Connections that may be open; one more closes the one that has waited longest without a request."""
    deadline_seconds: float = 300.0
    """A request that takes longer, waiting included, is stopped."""
    drain_seconds: float = 30.0
    """On SIGTERM: how long requests that are in work may go on."""
    max_new_tokens: int = 1024
    """Most tokens of an answer, also where a request names no limit."""
    max_choices: int = 4
    """Most answers to one request (`n`)."""
    max_images: int = 16
    """Most images in one request."""
    max_body_mb: int = 64
    """Largest request."""
    image_workers: int = 2
    """Images that are decoded at the same time; each may need 160 MB for a moment."""
    remote_images: Annotated[bool, FlagCreatePairsOff] = False
    """Fetch images that a request names by http(s) address. Off: only data URLs."""
    vision_cache_mb: int = 512
    """Memory for what the vision tower made of the latest images; 0: none."""
    vision_cache_dir: MaybePath = None
    """Directory that keeps it over a restart, too."""
    vision_cache_disk: str = "2GB"
    """Bound of that directory."""
    warmup: Annotated[bool, FlagCreatePairsOff] = False
    """Answer once before the first request, so that it is as fast as the later ones."""
    log_prompts: Annotated[bool, FlagCreatePairsOff] = False
    """Write questions and answers to the log. Pictures never are."""

    @property
    def vision_cache_disk_bytes(self) -> int:
        """`vision_cache_disk` in bytes."""
        return bytes(self.vision_cache_disk)

    def __post_init__(self) -> None:
        require(0 <= self.port <= 65535, f"--port is {self.port}; give 0 to 65535")
        require(self.make_key is None or is_name(self.make_key), f"--make-key is {self.make_key}; give a plain name")
        for name in (
            "parallel",
            "queue",
            "max_connections",
            "max_new_tokens",
            "max_choices",
            "max_images",
            "max_body_mb",
            "image_workers",
        ):
            require(getattr(self, name) >= 1, f"{option(name)} is {getattr(self, name)}; give 1 or more")
        for name in ("vision_cache_mb", "drain_seconds"):
            require(getattr(self, name) >= 0, f"{option(name)} is {getattr(self, name)}; give 0 or more")
        require(self.deadline_seconds > 0, f"--deadline-seconds is {self.deadline_seconds}; give more than 0")
        require(
            bytes(self.vision_cache_disk) > 0,
            f"--vision-cache-disk is {self.vision_cache_disk}; give a number with a unit, such as 2GB",
        )


@dataclass(frozen=True)
class DoctorConfig:
    """Say what this machine can run, how fast (measured, in about a minute), and what to install.

    Example:
        llama3v doctor
    """

    seconds: float = 0.5
    """Time for measuring the vision tower in each engine."""
    json: Annotated[bool, FlagCreatePairsOff] = False
    """Print one JSON object instead of tables."""

    def __post_init__(self) -> None:
        require(self.seconds > 0, f"--seconds is {self.seconds}; give more than 0")

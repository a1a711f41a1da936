"""Every option of every verb: frozen dataclasses, each field documented; the only place a default lives.

The command line is made from these (see cli.py), and the Python functions take them, for example
``llama3v.cache(llama3v.CacheConfig(action="info", cache=Path("/nvme/cache")))``.
"""

import math
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, Suppress, arg

from llama3v.errors import ConfigError

LlmWeights = Literal["fp32", "bf16", "int8", "nf4"]
Recipe = Literal["llama3_8b", "llama3_8b_lora_24gb", "smol"]
Policy = Literal["projector+llm", "llm", "seed"]
Precision = Literal["fp32", "bf16"]
Weights = Literal["f32", "f16", "bf16", "q8_0", "q4_k_m", "int8", "int4"]
Parallel = Literal["auto", "ddp", "fsdp"]
Attention = Literal["auto", "sdpa", "flex"]
Codec = Literal["bf16", "int8", "fp8"]
Mode = Literal["features", "pixels", "stream"]
Detail = Literal["low", "high"]
Runtime = Literal["torch", "llamacpp", "mlx", "auto"]
AnswerWeights = Literal["full", "int8", "int4"]
Tracker = Literal["tensorboard", "wandb", "trackio"]
Engine = Literal["torch", "torch-compile", "openvino", "onnxruntime", "mlx", "auto"]

MAX_TILES = 6
"""Slices of an image, at most, beside its overview: seven tiles in all, as the first Llama 3-V was described."""

# What may stay unset: its description says what happens then, so help does not add "(default: None)".
MaybeInt = Annotated[int | None, arg(metavar="INT", help_behavior_hint="")]
MaybeText = Annotated[str | None, arg(metavar="STR", help_behavior_hint="")]
MaybeFloat = Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="")]
MaybePath = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _is_name(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None


def _bytes(text: str) -> int:
    """Bytes in words: 200GB, 1.5TB, 500MiB. 0 for what is no such number."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kKMGT]?)(i?)B?", text.strip())
    if match is None:
        return 0
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kMGT".index(prefix.replace("K", "k") or " "))


def _is_default(options: object, name: str) -> bool:
    return getattr(options, name) == type(options).__dataclass_fields__[name].default  # type: ignore[attr-defined]


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_part(part: str) -> bool:
    number, _, parts = part.partition("/")
    return number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)


@dataclass(frozen=True)
class QuickstartConfig:
    """Build a small Llama 3-V from images and text, on this machine, in a few minutes.

    Draws scenes, encodes them into a cache, trains both stages, evaluates on held-out scenes, writes a report
    and asks one question. `--out` is then a model that ask, chat, caption and export take.

    Example:
        llama3v quickstart --out runs/quickstart
    """

    out: Path = Path("runs/quickstart")
    """Directory for the model, the report, the cache and summary.json."""
    seed: int = 0
    """Seed of the held-in scenes, the projector's weights and the order of training."""
    dollars_per_hour: float = 0.10
    """Price of this machine, to state the cost of the run (0.10 is a common price of a 2-core cloud
    machine)."""


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Run the vision tower once over a data set and keep its patch features: the encode pass.

    Resumable: what is committed is never encoded again, so after any interruption run the same command.

    Examples:
        llama3v encode --data photos/train.json --vision google/siglip-so400m-patch14-384 --cache /nvme/cache
        llama3v encode --follow stage1 --cache /nvme/cache --max-disk 200GB
    """

    data: Annotated[str, arg(metavar="STR", help_behavior_hint="(required without --follow)")] = ""
    """LLaVA JSON/JSONL, a parquet file or directory (the_cauldron, FineVision), or a folder of images
    with captions beside them."""
    vision: Annotated[str, arg(metavar="STR", help_behavior_hint="(required without --follow)")] = ""
    """Vision tower: a hub name, a local directory, or a Llama 3-V model directory (its tower, cut and
    slicing). With --follow: where the training's tower lies on this machine, if elsewhere."""
    cache: Path
    """Root of the feature cache."""
    follow: MaybeText = None
    """Instead of a data set, encode what the training with `--ring NAME` needs next, and free what it does not
    need any more, until it is done."""
    max_disk: MaybeText = None
    """Bound of a ring's features on disk, such as 200GB."""
    out: MaybePath = None
    """Directory for summary.json and the ledger of what was left out (default:
    <cache>/<fingerprint>/runs/<data name>)."""
    mode: Literal["features", "pixels"] = "features"
    """What is cached. features: what the tower computes. pixels: the decoded tiles, for any tower of this tile
    size; training with --mode pixels then runs the tower live."""
    cut: MaybeInt = None
    """Layer whose output is cached; layers after it are the top, which training can change (default: the
    last that is computed)."""
    max_tiles: MaybeInt = None
    """Most slices of one image beside its overview; 0: overview only (default: 6, or the model's own)."""
    precision: Precision = "fp32"
    """Precision of the forward pass; its features are rounded to bf16 either way."""
    codec: Codec = "bf16"
    """How features are stored: bf16; int8 or fp8 (half the bytes, at a small loss of precision)."""
    engine: Engine = "torch"
    """What runs the tower: torch; openvino, onnxruntime or mlx where that extra is installed; auto: the
    fastest on this machine, by measuring a few tiles. The features are the same."""
    batch_tiles: int = 16
    """Tiles in one forward pass."""
    shard_mb: int = 256
    """Size at which a shard is committed: a kill loses at most the open one."""
    max_bad_ratio: float = 0.05
    """Stop when more than this share of the images cannot be read."""
    limit: MaybeInt = None
    """Encode only the first N samples."""
    part: MaybeText = None
    """Encode only a part of the samples, so that several processes or machines share the work: 2/8 is every
    eighth sample from the second on."""
    ray_workers: int = 0
    """Workers on a Ray cluster that share the work (needs the extra `ray`); 0: this process alone."""
    score: Annotated[bool, FlagCreatePairsOff] = False
    """Also keep how probably each image and its text (the answer to the turn that shows it) belong together, by
    the text half of --vision. Images that are cached already are scored from the cache."""

    @property
    def max_disk_bytes(self) -> int:
        """`max_disk` in bytes."""
        return _bytes(self.max_disk or "")

    def __post_init__(self) -> None:
        _require(bool(self.follow or (self.data and self.vision)), "give --data and --vision, or --follow")
        _require(not (self.follow and self.data), "--follow takes its images from the training; leave --data away")
        _require((self.follow is None) == (self.max_disk is None), "--follow and --max-disk need each other")
        _require(not self.follow or _is_name(self.follow), f"--follow is {self.follow}; give the NAME of --ring")
        _require(
            self.max_disk is None or _bytes(self.max_disk) > 0,
            f"--max-disk is {self.max_disk}; give a number with a unit, such as 200GB",
        )
        fixed = [name for name in ("cut", "max_tiles", "codec", "limit") if not _is_default(self, name)]
        _require(
            not (self.follow and fixed),
            f"with --follow the training says what is encoded; leave {', '.join(map(_option, fixed))} away",
        )
        _require(
            not self.follow or (not self.part and not self.ray_workers and self.mode == "features"),
            "--follow shares the work by itself, with any number of others: leave --part, --ray-workers and --mode away",
        )
        _require(
            self.max_tiles is None or self.max_tiles >= 0,
            f"--max-tiles is {self.max_tiles}; give 0 (overview only) or more",
        )
        _require(not (self.follow and self.score), "a ring keeps no scores: leave --score away beside --follow")
        _require(
            self.mode == "features" or self.codec == "bf16",
            f"--codec {self.codec} is for features; mode {self.mode} stores tiles as they are: leave it away",
        )
        _require(self.batch_tiles >= 1, f"--batch-tiles is {self.batch_tiles}; give 1 or more")
        _require(
            self.part is None or _is_part(self.part),
            f"--part is {self.part}; give NUMBER/PARTS, such as 2/8",
        )
        _require(self.ray_workers >= 0, f"--ray-workers is {self.ray_workers}; give 0 (no Ray) or more")
        _require(not (self.part and self.ray_workers), "--ray-workers shares the work itself; leave --part away")
        _require(self.shard_mb >= 1, f"--shard-mb is {self.shard_mb}; give 1 or more")
        _require(
            0 <= self.max_bad_ratio <= 1,
            f"--max-bad-ratio is {self.max_bad_ratio}; give a share between 0 and 1",
        )


@dataclass(frozen=True)
class CacheConfig:
    """Look into a feature cache, check all of it, drop what no data set needs, export features, see pair scores.

    Examples:
        llama3v cache info /nvme/cache
        llama3v cache verify /nvme/cache --out reports
        llama3v cache prune /nvme/cache --keep photos/train.json --yes
        llama3v cache export /nvme/cache --out plain --limit 1000
        llama3v cache scores /nvme/cache --data photos/train.json --min-score 0.05 --out reports
    """

    action: Positional[Literal["info", "verify", "prune", "export", "scores"]]
    """info: counts, bytes and the fingerprint in words. verify: read every record and check its checksum.
    prune: drop records that `keep` does not name, records that are set aside, and duplicates. export: write
    plain safetensors files and the names of the images, for programs that know nothing of caches. scores: how the
    pairs scored that `encode --score` met, as an HTML report."""
    cache: Positional[Path]
    """Root of the feature cache."""
    out: MaybePath = None
    """Directory for the report, <action>.json; for export, of the files too."""
    fingerprint: MaybeText = None
    """Only the features of this fingerprint (default: all; export takes one)."""
    keep: Annotated[tuple[str, ...], arg(metavar="DATA...", help_behavior_hint="")] = ()
    """prune and export: data sets (as encode takes them, or their digests as `info` shows them) whose images
    are kept or exported (default: every record)."""
    yes: Annotated[bool, FlagCreatePairsOff] = False
    """prune: do it; without, only tell what would go."""
    limit: MaybeInt = None
    """export: only the first N records, in the order of their keys."""
    file_mb: int = 512
    """export: size of a file of features, about."""
    data: Annotated[tuple[str, ...], arg(metavar="DATA...", help_behavior_hint="")] = ()
    """scores: data sets whose pairs are reported and shown (default: numbers alone, of all pairs)."""
    min_score: MaybeFloat = None
    """scores: show what training with this --min-score would leave out."""
    worst: int = 24
    """scores: how many of the pairs with the lowest scores are shown."""

    def __post_init__(self) -> None:
        _require(self.action in ("prune", "export") or not self.keep, f"--keep has no meaning for {self.action}")
        _require(self.action == "prune" or not self.yes, f"--yes has no meaning for {self.action}")
        _require(self.action == "export" or self.limit is None, f"--limit has no meaning for {self.action}")
        _require(
            self.action not in ("export", "scores") or self.out is not None,
            f"{self.action} needs a directory: --out DIR",
        )
        _require(self.action == "scores" or not self.data, f"--data has no meaning for {self.action}")
        _require(self.action == "scores" or self.min_score is None, f"--min-score has no meaning for {self.action}")
        _require(
            self.min_score is None or 0 <= self.min_score <= 1,
            f"--min-score is {self.min_score}; give a probability, 0 to 1",
        )
        _require(self.worst >= 0, f"--worst is {self.worst}; give 0 or more")
        _require(self.limit is None or self.limit >= 1, f"--limit is {self.limit}; give 1 or more")
        _require(self.file_mb >= 1, f"--file-mb is {self.file_mb}; give 1 or more")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What both stages share."""

    recipe: Annotated[Recipe | None, arg(help_behavior_hint="")] = None
    """Start from a named set of options; the ones you give win. With --help it says what it is and what it
    takes, with --dry-run what it comes to on your data."""
    data: Annotated[tuple[str, ...], arg(metavar="DATA...")]
    """One or more data sets (see `llama3v encode --help`); their images must be in the cache."""
    cache: MaybePath = None
    """Root of the feature cache that `llama3v encode` filled (not needed in mode stream)."""
    mode: Mode = "features"
    """Where features come from. features: the cache. pixels: a cache of decoded tiles (`encode --mode pixels`);
    the vision tower runs live. stream: the images; nothing is cached."""
    ring: MaybeText = None
    """Name of a ring: features come from `llama3v encode --follow NAME`, run beside the training, which keeps
    them within --max-disk."""
    codec: Annotated[Codec | None, arg(help_behavior_hint="")] = None
    """Which codec to read, where the cache has these features in several (default: the one that is there)."""
    out: Path
    """Directory for checkpoints, metrics.jsonl, curves, summary.json and the trained model. Run again to
    resume."""
    steps: MaybeInt = None
    """Optimizer steps (default: as many as `epochs` needs)."""
    epochs: float = 1.0
    """Passes over the data, where `steps` is not given."""
    row_tokens: int = 2048
    """Tokens in a packed row (visual and text)."""
    too_long: Literal["leave-out", "error"] = "leave-out"
    """What becomes of a sample that is longer than a row: it goes to the ledger, or the run stops before it trains.
    None is ever cut short."""
    rows_per_step: int = 8
    """Packed rows in one optimizer step (the global batch, of all processes)."""
    rows_per_pass: int = 8
    """Packed rows in one forward and backward pass of a process; fewer need less memory and change nothing else."""
    learning_rate: float = 1e-4
    """Peak learning rate of the projector (and of the vision top under `seed`)."""
    warmup: float = 0.03
    """Share of the steps in which the learning rate rises; then it falls by a cosine to zero."""
    weight_decay: float = 0.0
    """AdamW weight decay of matrices."""
    clip_norm: float = 1.0
    """Largest global gradient norm."""
    parallel: Parallel = "auto"
    """How several processes (torchrun) share the model. ddp: each has all of it. fsdp: each has a part of every
    tensor. auto: fsdp where the LLM's own weights train, else ddp."""
    rank_timeout: float = 600.0
    """Seconds without an answer after which another process counts as dead or hung, and the run stops."""
    activation_checkpointing: Annotated[bool, FlagCreatePairsOff] = False
    """Compute the LLM's activations again in the backward pass instead of keeping them: less memory, about a
    third more time."""
    precision: Precision = "fp32"
    """bf16: autocast of the forward pass; weights and optimizer stay fp32."""
    llm_weights: LlmWeights = "fp32"
    """How the LLM is held where its own weights do not train: fp32; bf16 (with --precision bf16); int8 or nf4, for
    small GPUs (needs the extra `lora`). Other than fp32, --out refers to the LLM instead of holding it."""
    attention: Attention = "auto"
    """How packed rows attend. sdpa: everywhere. flex: FlexAttention, which skips what samples do not see of each
    other. auto: that on a GPU under bf16, if it agrees with sdpa there; sdpa otherwise."""
    seed: int = 0
    """Seed of the order, the packing and new weights."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints that are kept; older ones are removed."""
    validation: MaybeText = None
    """A data set whose loss is measured with the right and with shuffled images (does the model see?)."""
    validate_every: MaybeInt = None
    """Steps between validations (default: only at the end)."""
    validation_samples: int = 256
    """Samples of `validation` that are used."""
    sample_every: MaybeInt = None
    """Steps between sample answers: what the model says about a few pictures, of `validation` if there is one
    (default: only at the end)."""
    stop_on_alarm: Annotated[bool, FlagCreatePairsOff] = False
    """Stop, with a checkpoint, at a loss far above those of the steps before (without: it is told, no more)."""
    trackers: Annotated[
        tuple[Tracker, ...], arg(metavar="[{tensorboard,wandb,trackio} ...]", help_behavior_hint="")
    ] = ()
    """Where the figures go beside metrics.jsonl (each needs the extra of its name)."""
    limit: MaybeInt = None
    """Use only the first N samples of each data set."""
    max_bad_ratio: float = 0.05
    """Stop when more than this share of the samples cannot be used."""
    preemption_hours: MaybeFloat = None
    """Mean hours between preemptions of this machine. Checkpoints are then written as often as loses the least
    time (Young's formula, from what a save takes), instead of every `checkpoint_every` steps."""
    min_score: MaybeFloat = None
    """Leave out samples whose pair score (`encode --score`) is lower; `llama3v cache scores` shows which. The
    validation set is not filtered."""
    dollars_per_hour: float = 0.0
    """Price of this machine, to state what the run costs."""
    budget: MaybeFloat = None
    """Dollars that the run may cost, all its parts together (needs `dollars_per_hour`): before it costs more, it
    writes a checkpoint and stops, to go on under a higher budget."""
    dry_run: Annotated[bool, FlagCreatePairsOff] = False
    """Print the plan and stop: what trains, steps, memory by part, time and dollars; then one real step on a
    scaled-down copy. Needs no weights, no cache and no GPU, and writes nothing."""

    def __post_init__(self) -> None:
        _require(len(self.data) > 0, "--data is empty; name at least one data set")
        _require(self.cache is not None or self.mode == "stream", f"mode {self.mode} needs a cache: give --cache DIR")
        _require(self.mode == "features" or self.codec is None, f"--codec has no meaning in mode {self.mode}")
        _require(self.ring is None or self.mode == "features", f"--ring has no meaning in mode {self.mode}")
        _require(self.ring is None or _is_name(self.ring), f"--ring is {self.ring}; give letters, digits, . _ -")
        _require(
            self.llm_weights != "bf16" or self.precision == "bf16",
            "--llm-weights bf16 computes in bf16: give --precision bf16, too",
        )
        _require(self.steps is None or self.steps >= 1, f"--steps is {self.steps}; give 1 or more")
        _require(self.epochs > 0, f"--epochs is {self.epochs}; give more than 0")
        _require(
            self.rows_per_step >= 1 and self.rows_per_pass >= 1,
            "--rows-per-step and --rows-per-pass start at 1",
        )
        _require(
            self.parallel != "fsdp" or self.llm_weights == "fp32",
            f"--parallel fsdp shards weights in fp32; with --llm-weights {self.llm_weights} use --parallel ddp",
        )
        _require(self.rank_timeout > 0, f"--rank-timeout is {self.rank_timeout}; give more than 0 seconds")
        _require(
            self.sample_every is None or self.sample_every >= 1,
            f"--sample-every is {self.sample_every}; give 1 or more",
        )
        _require(0 <= self.warmup < 1, f"--warmup is {self.warmup}; give a share between 0 and 1")
        _require(
            self.min_score is None or 0 <= self.min_score <= 1,
            f"--min-score is {self.min_score}; give a probability, 0 to 1",
        )
        _require(
            self.min_score is None or (self.mode != "stream" and self.ring is None),
            "--min-score needs the scores of a cache; there is none in mode stream, nor with --ring",
        )
        _require(self.checkpoint_every >= 1, f"--checkpoint-every is {self.checkpoint_every}; give 1 or more")
        _require(
            self.preemption_hours is None or self.preemption_hours > 0,
            f"--preemption-hours is {self.preemption_hours}; give more than 0",
        )
        _require(
            self.preemption_hours is None or self.ring is None,
            "--preemption-hours has no meaning with --ring, which counts on a checkpoint every --checkpoint-every steps",
        )
        _require(
            self.budget is None or (self.budget > 0 and self.dollars_per_hour > 0),
            "--budget is counted in dollars: give more than 0, and the price of this machine as --dollars-per-hour",
        )
        _require(self.keep_checkpoints >= 1, f"--keep-checkpoints is {self.keep_checkpoints}; give 1 or more")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """Stage 1: align images with text. Only the projector trains; vision tower and LLM are frozen.

    Example:
        llama3v pretrain --data captions.json --vision google/siglip-so400m-patch14-384 \\
            --llm meta-llama/Meta-Llama-3-8B-Instruct --cache /nvme/cache --out runs/stage1
    """

    vision: str
    """Vision tower: the one the cache was made with."""
    llm: str
    """Language model: a hub name, a local directory or a GGUF file. Llama architecture."""
    cut: MaybeInt = None
    """The layer the cache holds (default: the last that is computed)."""
    max_tiles: int = MAX_TILES
    """As in the encode pass; it becomes a property of the model."""
    scale_factor: int = 3
    """r: r x r patches become one visual token; it must divide the side of the patch grid."""
    projector_blocks: int = 2
    """Self-attention blocks of the projector. Two make a Llama 3-V; other counts are for ablations."""
    projector_head: Literal["linear", "mlp"] = "linear"
    """What follows them. mlp, for ablations: the two layers of LLaVA-1.5, which cannot be exported."""
    prompt_format: Literal["auto", "llama3", "chatml"] = "auto"
    """How turns are written; auto reads it off the tokenizer's special tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.projector_blocks >= 0, f"--projector-blocks is {self.projector_blocks}; give 0 or more")


@dataclass(frozen=True, kw_only=True)
class SftConfig(TrainConfig):
    """Stage 2: supervised fine-tuning on conversations. `--policy` says what trains.

    Example:
        llama3v sft --data conversations.json --model runs/stage1 --cache /nvme/cache --out runs/stage2
    """

    model: str
    """A Llama 3-V model directory, usually stage 1's output."""
    policy: Policy = "projector+llm"
    """projector+llm; llm (projector frozen); seed (vision top and projector, as first described)."""
    max_tiles: MaybeInt = None
    """Most slices of an image from here on, as in the encode pass of this stage's data (default: the model's)."""
    learning_rate: float = 2e-5
    """Peak learning rate of the projector (and of the vision top under `seed`)."""
    llm_learning_rate: float = 2e-5
    """Peak learning rate of the LLM or its adapters, where they train. Adapters want about ten times as much."""
    lora_rank: int = 0
    """Rank of LoRA adapters, which train instead of the LLM's own weights; 0: its own weights train."""
    lora_alpha: MaybeFloat = None
    """What adapters add is multiplied by alpha / rank (default: twice the rank)."""
    lora_dropout: float = 0.0
    """Share of an adapter's inputs that is left out in training."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers of the LLM's blocks that get adapters (default: all seven of a Llama)."""

    @property
    def llm_trains(self) -> bool:
        """Whether the LLM's own weights do."""
        return self.policy != "seed" and self.lora_rank == 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(
            self.max_tiles is None or self.max_tiles >= 0,
            f"--max-tiles is {self.max_tiles}; give 0 (overview only) or more",
        )
        _require(self.lora_rank >= 0, f"--lora-rank is {self.lora_rank}; give 0 (no adapters) or more")
        _require(
            self.policy != "seed" or self.lora_rank == 0,
            "--lora-rank has no meaning under --policy seed, where the LLM is frozen; use projector+llm or llm",
        )
        _require(self.lora_alpha is None or self.lora_alpha > 0, f"--lora-alpha is {self.lora_alpha}; give more than 0")
        _require(0 <= self.lora_dropout < 1, f"--lora-dropout is {self.lora_dropout}; give a share between 0 and 1")
        _require(len(self.lora_targets) > 0, "--lora-targets is empty; name layers such as q_proj")
        _require(
            self.llm_weights == "fp32" or not self.llm_trains,
            f"--llm-weights {self.llm_weights} is for an LLM whose own weights do not train: give --lora-rank, or "
            "--policy seed",
        )


@dataclass(frozen=True)
class MergeConfig:
    """Write a model that stands alone: LoRA adapters become part of the LLM's weights, which --out then holds.

    ask, chat, caption and export need no merging: they take what `llama3v sft --lora-rank` leaves as it is.

    Example:
        llama3v merge runs/stage2 --out merged
    """

    model: Positional[str]
    """A Llama 3-V model directory that refers to its LLM: what `sft --lora-rank` or `--llm-weights` left."""
    out: Path
    """Directory to write."""
    precision: Precision = "fp32"
    """Type of the written weights; bf16 takes half the space, at the rounding of bf16."""


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

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            _require(math.isfinite(value), f"{_option(name)} is {value}; give a number")
        _require(self.temperature >= 0, f"--temperature is {self.temperature}; give 0 or more")
        _require(self.top_k >= 0, f"--top-k is {self.top_k}; give 0 (all) or more")
        _require(0 < self.top_p <= 1, f"--top-p is {self.top_p}; give more than 0, at most 1")
        _require(0 <= self.min_p < 1, f"--min-p is {self.min_p}; give 0 or more, below 1")
        _require(self.repetition_penalty > 0, f"--repetition-penalty is {self.repetition_penalty}; give more than 0")
        _require(self.seed >= 0, f"--seed is {self.seed}; give 0 or more")
        _require(all(self.stop), "--stop has an empty text; give texts of one character or more")
        _require(self.logprobs is None or self.logprobs >= 0, f"logprobs is {self.logprobs}; give 0 or more")

    @property
    def sampling(self) -> "Sampling":
        """These alone, of options that have more."""
        return Sampling(**{field.name: getattr(self, field.name) for field in fields(Sampling)})


MaybeRuntime = Annotated[Runtime | None, arg(metavar="{torch,llamacpp,mlx,auto}", help_behavior_hint="")]


@dataclass(frozen=True, kw_only=True)
class Running:
    """On what a trained model runs."""

    engine: MaybeRuntime = None
    """torch, llamacpp (a GGUF pair) or mlx (Apple). auto measures those that can run the model and says which is
    fastest. Without it: llamacpp for a GGUF pair, else torch."""
    weights: AnswerWeights = "full"
    """Hold the LLM's matrices in 8 or 4 bits: less memory, other answers. full: as they are."""


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
        _require(len(self.inputs) >= 1, 'give image files and a question: llama3v ask photo.jpg "What is it?"')
        _require(self.max_new_tokens >= 1, f"--max-new-tokens is {self.max_new_tokens}; give 1 or more")
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
        _require(self.max_new_tokens >= 1, f"--max-new-tokens is {self.max_new_tokens}; give 1 or more")
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
    """Image files or folders."""
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
        _require(len(self.inputs) >= 1, "give image files or folders: llama3v caption photo.jpg")
        _require(self.max_new_tokens >= 1, f"--max-new-tokens is {self.max_new_tokens}; give 1 or more")
        _require(self.format == "jsonl" or self.out is not None, f"--format {self.format} needs a directory: --out DIR")


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
            _require(
                self.format in formats or _is_default(self, name),
                f"--{name} has no meaning for --format {self.format}",
            )
        offered: dict[str, tuple[str, ...]] = {
            "hf": (),
            "gguf": ("f32", "f16", "bf16", "q8_0", "q4_k_m"),
            "mlx": ("f32", "f16", "bf16", "int8", "int4"),
        }
        choices = offered.get(self.format, ("f32", "f16"))
        _require(
            self.weights is None or self.weights in choices,
            f"--weights {self.weights} has no meaning for --format {self.format}; "
            + (f"give one of {', '.join(choices)}" if choices else "leave it away"),
        )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Measure a model on benchmarks: with the right image, with a wrong one, and blind.

    Resumable: answers that `--out` holds are not asked for again. docs/evaluation.md has the tasks and their rules.

    Examples:
        llama3v eval --model runs/quickstart --tasks probes --out evaluated
        llama3v eval --model runs/stage2 --tasks mmmu,ai2d,pope --data benchmarks --limit 500 --out evaluated
        llama3v eval --url http://localhost:8000/v1 --api-model peer --tasks short=questions.json --out peer
    """

    tasks: Annotated[tuple[str, ...], arg(metavar="TASK...")]
    """Tasks, with commas or spaces between: NAME, NAME=PATH or NAME:LABEL=PATH. PATH is a file, a folder or a hub data
    set (owner/name); LABEL tells two data sets of one task apart."""
    out: Path
    """Directory for the answers, the scores, summary.json and eval.html. Run again to resume."""
    model: MaybeText = None
    """A Llama 3-V model directory, hub name or GGUF pair."""
    url: MaybeText = None
    """Instead of a model, an OpenAI-compatible endpoint, so that others are measured by the same code. Its key is read
    from the environment: OPENAI_API_KEY (needs the extra `api`)."""
    api_model: MaybeText = None
    """Name of the model at --url."""
    data: MaybePath = None
    """Folder of the benchmarks: each PATH is looked for in it first, and a task without a PATH is <data>/NAME (default:
    the task's own data set on the hub)."""
    limit: MaybeInt = None
    """Only the first N samples of each task."""
    batch: int = 16
    """Questions that are answered together."""
    cache: MaybePath = None
    """Root of a feature cache; images that are in it are not encoded again."""
    controls: Annotated[bool, arg()] = True
    """Also ask everything with a wrong image and blind. Only the difference is sight, so leave them out for hurry
    alone."""
    detail: Annotated[Literal["low", "high", "both"] | None, arg(help_behavior_hint="")] = None
    """How much of an image is shown. low: the overview only. high: its slices, too. both: high, and low beside it.
    (default: as the model was trained; as the endpoint likes)"""
    judge_url: MaybeText = None
    """OpenAI-compatible endpoint of the judge, for tasks that need one (llavabench); its key is read from
    JUDGE_API_KEY, else OPENAI_API_KEY."""
    judge_model: MaybeText = None
    """Name of the judge there. It is printed beside its scores, which compare only under the same judge."""
    trained_cache: MaybePath = None
    """Root of the cache that the model was trained from: says which pictures of a task are in it, and what the model
    scores without them."""
    trained_data: Annotated[tuple[str, ...], arg(metavar="DATA...", help_behavior_hint="")] = ()
    """What the model was trained on: finds near-duplicates, too (needs the extra `duplicates`), and keeps to those
    images of --trained-cache that these data sets name."""

    def __post_init__(self) -> None:
        _require(
            (self.model is None) != (self.url is None), "give what is measured: --model, or --url with --api-model"
        )
        _require((self.url is None) == (self.api_model is None), "--url and --api-model need each other")
        _require(
            (self.judge_url is None) == (self.judge_model is None), "--judge-url and --judge-model need each other"
        )
        _require(self.limit is None or self.limit >= 1, f"--limit is {self.limit}; give 1 or more")
        _require(self.batch >= 1, f"--batch is {self.batch}; give 1 or more")
        _require(self.cache is None or self.model is not None, "--cache has no meaning for an endpoint")
        _require(
            self.detail != "both" or self.model is not None,
            "--detail both is for models; measure an endpoint with low and with high, then `llama3v compare` the two",
        )


@dataclass(frozen=True)
class CompareConfig:
    """Is one model better than another? Two runs of `llama3v eval` on the same samples, paired, with a test.

    Example:
        llama3v compare evaluated peer
    """

    first: Positional[Path]
    """What `llama3v eval` left in --out."""
    second: Positional[Path]
    """What it left of another model, on the same tasks, data and --limit."""
    condition: Literal["right image", "wrong image", "blind", "overview only"] = "right image"
    """Which of the conditions is compared."""
    out: MaybePath = None
    """Directory for summary.json."""


@dataclass(frozen=True, kw_only=True)
class AblateConfig:
    """What does each part of the model bring? Short trainings that differ in one thing, from one feature cache.

    Every variant is trained at the same steps, data order and seeds as the base (a Llama 3-V with the options given
    here), and compared with it seed by seed. Run again to go on: finished trainings are kept.

    Example:
        llama3v ablate --data train.json --validation dev.json --cache cache --vision siglip --llm smollm2 \\
            --variants linear mlp blocks=1 r=1 --pretrain-steps 100 --sft-steps 100 --out ablation
    """

    data: Annotated[tuple[str, ...], arg(metavar="DATA...")]
    """Data sets of both stages; their images must be in the cache, as every variant needs them."""
    validation: str
    """A data set that is not trained on: its loss with the right and with shuffled images is what is compared."""
    cache: Path
    """Root of the feature cache."""
    vision: str
    """Vision tower, as in pretrain."""
    llm: str
    """Language model, as in pretrain."""
    out: Path
    """Directory for the table (ablation.json, ablation.html) and the trainings."""
    variants: Annotated[tuple[str, ...], arg(metavar="VARIANT...")] = ("linear", "mlp", "blocks=1")
    """What is changed, one variant each: blocks=N, linear (blocks=0), mlp (LLaVA-1.5's projector), r=N, max-tiles=N,
    cut=N, codec=NAME, policy=NAME, no-stage-1; joined by + to change several at once, as in cut=20+policy=seed."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each variant is trained once with each; they decide new weights and the order of samples."""
    pretrain_steps: int = 100
    """Steps of stage 1."""
    sft_steps: int = 0
    """Steps of stage 2; 0 compares after stage 1."""
    scale_factor: int = 3
    """r of the base."""
    max_tiles: int = 0
    """Most slices of an image, of the base."""
    row_tokens: int = 256
    """Tokens in a packed row."""
    rows_per_step: int = 4
    """Packed rows in one optimizer step."""
    learning_rate: float = 1e-4
    """Peak learning rate of the projector, in both stages."""
    llm_learning_rate: float = 2e-4
    """Peak learning rate of the LLM in stage 2."""
    precision: Precision = "fp32"
    """Precision of forward and backward passes."""
    validation_samples: int = 256
    """Samples of `validation` that are used."""
    limit: MaybeInt = None
    """Use only the first N samples of each data set."""
    dollars_per_hour: float = 0.0
    """Price of this machine."""
    keep_models: Annotated[bool, FlagCreatePairsOff] = False
    """Keep the weights of every training (default: only what was measured)."""

    def __post_init__(self) -> None:
        _require(len(self.seeds) >= 1, "--seeds is empty; give one or more")
        _require(len(set(self.seeds)) == len(self.seeds), "--seeds names one twice; give each once")
        _require(self.pretrain_steps >= 1, f"--pretrain-steps is {self.pretrain_steps}; give 1 or more")
        _require(self.sft_steps >= 0, f"--sft-steps is {self.sft_steps}; give 0 (stage 1 only) or more")


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
        return _bytes(self.vision_cache_disk)

    def __post_init__(self) -> None:
        _require(0 <= self.port <= 65535, f"--port is {self.port}; give 0 to 65535")
        _require(self.make_key is None or _is_name(self.make_key), f"--make-key is {self.make_key}; give a plain name")
        for name in (
            "parallel",
            "queue",
            "max_new_tokens",
            "max_choices",
            "max_images",
            "max_body_mb",
            "image_workers",
        ):
            _require(getattr(self, name) >= 1, f"{_option(name)} is {getattr(self, name)}; give 1 or more")
        for name in ("vision_cache_mb", "drain_seconds"):
            _require(getattr(self, name) >= 0, f"{_option(name)} is {getattr(self, name)}; give 0 or more")
        _require(self.deadline_seconds > 0, f"--deadline-seconds is {self.deadline_seconds}; give more than 0")
        _require(
            _bytes(self.vision_cache_disk) > 0,
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
        _require(self.seconds > 0, f"--seconds is {self.seconds}; give more than 0")

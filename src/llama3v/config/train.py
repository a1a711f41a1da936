"""Options of the two stages of training, and of merging adapters."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from llama3v.config.base import Codec, MaybeFloat, MaybeInt, MaybePath, MaybeText, Precision, is_name, require

LlmWeights = Literal["fp32", "bf16", "int8", "nf4"]
Recipe = Literal["llama3_8b", "llama3_8b_lora_24gb", "smol"]
Policy = Literal["projector+llm", "llm", "seed"]
Parallel = Literal["auto", "ddp", "fsdp"]
Attention = Literal["auto", "sdpa", "flex"]
Mode = Literal["features", "pixels", "stream"]
Tracker = Literal["tensorboard", "wandb", "trackio"]

MAX_TILES = 6
"""Slices of an image, at most, beside its overview: seven tiles in all, as the first Llama 3-V was described."""


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
        require(len(self.data) > 0, "--data is empty; name at least one data set")
        require(self.cache is not None or self.mode == "stream", f"mode {self.mode} needs a cache: give --cache DIR")
        require(self.mode == "features" or self.codec is None, f"--codec has no meaning in mode {self.mode}")
        require(self.ring is None or self.mode == "features", f"--ring has no meaning in mode {self.mode}")
        require(self.ring is None or is_name(self.ring), f"--ring is {self.ring}; give letters, digits, . _ -")
        require(
            self.llm_weights != "bf16" or self.precision == "bf16",
            "--llm-weights bf16 computes in bf16: give --precision bf16, too",
        )
        require(self.steps is None or self.steps >= 1, f"--steps is {self.steps}; give 1 or more")
        require(self.epochs > 0, f"--epochs is {self.epochs}; give more than 0")
        require(
            self.rows_per_step >= 1 and self.rows_per_pass >= 1,
            "--rows-per-step and --rows-per-pass start at 1",
        )
        require(
            self.parallel != "fsdp" or self.llm_weights == "fp32",
            f"--parallel fsdp shards weights in fp32; with --llm-weights {self.llm_weights} use --parallel ddp",
        )
        require(self.rank_timeout > 0, f"--rank-timeout is {self.rank_timeout}; give more than 0 seconds")
        require(
            self.sample_every is None or self.sample_every >= 1,
            f"--sample-every is {self.sample_every}; give 1 or more",
        )
        require(0 <= self.warmup < 1, f"--warmup is {self.warmup}; give a share between 0 and 1")
        require(
            self.min_score is None or 0 <= self.min_score <= 1,
            f"--min-score is {self.min_score}; give a probability, 0 to 1",
        )
        require(
            self.min_score is None or (self.mode != "stream" and self.ring is None),
            "--min-score needs the scores of a cache; there is none in mode stream, nor with --ring",
        )
        require(self.checkpoint_every >= 1, f"--checkpoint-every is {self.checkpoint_every}; give 1 or more")
        require(
            self.preemption_hours is None or self.preemption_hours > 0,
            f"--preemption-hours is {self.preemption_hours}; give more than 0",
        )
        require(
            self.preemption_hours is None or self.ring is None,
            "--preemption-hours has no meaning with --ring, which counts on a checkpoint every --checkpoint-every steps",
        )
        require(
            self.budget is None or (self.budget > 0 and self.dollars_per_hour > 0),
            "--budget is counted in dollars: give more than 0, and the price of this machine as --dollars-per-hour",
        )
        require(self.keep_checkpoints >= 1, f"--keep-checkpoints is {self.keep_checkpoints}; give 1 or more")


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
        require(self.projector_blocks >= 0, f"--projector-blocks is {self.projector_blocks}; give 0 or more")


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
        require(
            self.max_tiles is None or self.max_tiles >= 0,
            f"--max-tiles is {self.max_tiles}; give 0 (overview only) or more",
        )
        require(self.lora_rank >= 0, f"--lora-rank is {self.lora_rank}; give 0 (no adapters) or more")
        require(
            self.policy != "seed" or self.lora_rank == 0,
            "--lora-rank has no meaning under --policy seed, where the LLM is frozen; use projector+llm or llm",
        )
        require(self.lora_alpha is None or self.lora_alpha > 0, f"--lora-alpha is {self.lora_alpha}; give more than 0")
        require(0 <= self.lora_dropout < 1, f"--lora-dropout is {self.lora_dropout}; give a share between 0 and 1")
        require(len(self.lora_targets) > 0, "--lora-targets is empty; name layers such as q_proj")
        require(
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

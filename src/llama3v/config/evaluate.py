"""Options of the verbs that measure a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from llama3v.config.base import MaybeInt, MaybePath, MaybeText, Precision, require


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
    """OpenAI-compatible endpoint of the judge, for tasks that have one: llavabench has no score without, mmbench counts
    answers that match no option as wrong without. Its key is read from JUDGE_API_KEY, else OPENAI_API_KEY."""
    judge_model: MaybeText = None
    """Name of the judge there. It is printed beside its scores, which compare only under the same judge."""
    trained_cache: MaybePath = None
    """Root of the cache that the model was trained from: says which pictures of a task are in it, and what the model
    scores without them."""
    trained_data: Annotated[tuple[str, ...], arg(metavar="DATA...", help_behavior_hint="")] = ()
    """What the model was trained on: finds near-duplicates, too (needs the extra `duplicates`), and keeps to those
    images of --trained-cache that these data sets name."""

    def __post_init__(self) -> None:
        require((self.model is None) != (self.url is None), "give what is measured: --model, or --url with --api-model")
        require((self.url is None) == (self.api_model is None), "--url and --api-model need each other")
        require((self.judge_url is None) == (self.judge_model is None), "--judge-url and --judge-model need each other")
        require(self.limit is None or self.limit >= 1, f"--limit is {self.limit}; give 1 or more")
        require(self.batch >= 1, f"--batch is {self.batch}; give 1 or more")
        require(self.cache is None or self.model is not None, "--cache has no meaning for an endpoint")
        require(
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
            --variants linear mlp blocks=1 r=1 --row-tokens 1024 --pretrain-steps 100 --sft-steps 100 --out ablation
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
        require(len(self.seeds) >= 1, "--seeds is empty; give one or more")
        require(len(set(self.seeds)) == len(self.seeds), "--seeds names one twice; give each once")
        require(self.pretrain_steps >= 1, f"--pretrain-steps is {self.pretrain_steps}; give 1 or more")
        require(self.sft_steps >= 0, f"--sft-steps is {self.sft_steps}; give 0 (stage 1 only) or more")

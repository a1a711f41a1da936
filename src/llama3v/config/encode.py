"""Options of the verbs that make and look after a feature cache, and of the quickstart."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from llama3v.config.base import (
    Codec,
    MaybeFloat,
    MaybeInt,
    MaybePath,
    MaybeText,
    Precision,
    bytes,
    is_default,
    is_name,
    option,
    require,
)

Engine = Literal["torch", "torch-compile", "openvino", "onnxruntime", "mlx", "auto"]


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
        return bytes(self.max_disk or "")

    def __post_init__(self) -> None:
        require(bool(self.follow or (self.data and self.vision)), "give --data and --vision, or --follow")
        require(not (self.follow and self.data), "--follow takes its images from the training; leave --data away")
        require((self.follow is None) == (self.max_disk is None), "--follow and --max-disk need each other")
        require(not self.follow or is_name(self.follow), f"--follow is {self.follow}; give the NAME of --ring")
        require(
            self.max_disk is None or bytes(self.max_disk) > 0,
            f"--max-disk is {self.max_disk}; give a number with a unit, such as 200GB",
        )
        fixed = [name for name in ("cut", "max_tiles", "codec", "limit") if not is_default(self, name)]
        require(
            not (self.follow and fixed),
            f"with --follow the training says what is encoded; leave {', '.join(map(option, fixed))} away",
        )
        require(
            not self.follow or (not self.part and not self.ray_workers and self.mode == "features"),
            "--follow shares the work by itself, with any number of others: leave --part, --ray-workers and --mode away",
        )
        require(
            self.max_tiles is None or self.max_tiles >= 0,
            f"--max-tiles is {self.max_tiles}; give 0 (overview only) or more",
        )
        require(not (self.follow and self.score), "a ring keeps no scores: leave --score away beside --follow")
        require(
            self.mode == "features" or self.codec == "bf16",
            f"--codec {self.codec} is for features; mode {self.mode} stores tiles as they are: leave it away",
        )
        require(self.batch_tiles >= 1, f"--batch-tiles is {self.batch_tiles}; give 1 or more")
        require(
            self.part is None or _is_part(self.part),
            f"--part is {self.part}; give NUMBER/PARTS, such as 2/8",
        )
        require(self.ray_workers >= 0, f"--ray-workers is {self.ray_workers}; give 0 (no Ray) or more")
        require(not (self.part and self.ray_workers), "--ray-workers shares the work itself; leave --part away")
        require(self.shard_mb >= 1, f"--shard-mb is {self.shard_mb}; give 1 or more")
        require(
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
        require(self.action in ("prune", "export") or not self.keep, f"--keep has no meaning for {self.action}")
        require(self.action == "prune" or not self.yes, f"--yes has no meaning for {self.action}")
        require(self.action == "export" or self.limit is None, f"--limit has no meaning for {self.action}")
        require(
            self.action not in ("export", "scores") or self.out is not None,
            f"{self.action} needs a directory: --out DIR",
        )
        require(self.action == "scores" or not self.data, f"--data has no meaning for {self.action}")
        require(self.action == "scores" or self.min_score is None, f"--min-score has no meaning for {self.action}")
        require(
            self.min_score is None or 0 <= self.min_score <= 1,
            f"--min-score is {self.min_score}; give a probability, 0 to 1",
        )
        require(self.worst >= 0, f"--worst is {self.worst}; give 0 or more")
        require(self.limit is None or self.limit >= 1, f"--limit is {self.limit}; give 1 or more")
        require(self.file_mb >= 1, f"--file-mb is {self.file_mb}; give 1 or more")

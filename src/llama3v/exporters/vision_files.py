"""Tower and projector as one file for OpenVINO (vision.xml, vision.bin) or ONNX Runtime (vision.onnx).

    pixel_values float32 [tiles, 3, S, S]  ->  visual_tokens float32 [tiles, tokens_per_tile, hidden]

What a program must know to use one stands in its metadata (engines/vision_file.py). Weights in float32, or in float16
of which the runtime makes float32: computing is in float32 either way.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llama3v.engines.vision_file import FILES, OUR_KEYS, Runtime, VisionFacts
from llama3v.errors import ConfigError
from llama3v.exporters.onnx_graph import vision_graph
from llama3v.model.llama3v import Llama3VForConditionalGeneration
from llama3v.model.vision import SiglipTower

_LARGEST_PROTOBUF = 2**30
"""Bytes of weights above which they go into a file of their own, vision.onnx.data; ONNX's own limit is twice that."""


def write_vision_file(
    model: Llama3VForConditionalGeneration, tower: SiglipTower, directory: Path, *, runtime: Runtime, half: bool
) -> int:
    """Write the file of a runtime into `directory`; returns the bytes written.

    Args:
        tower: `model.vision`. half: weights in float16.

    Raises ConfigError where the package that writes it is not installed.
    """
    require_writer(runtime)
    before = set(directory.iterdir())
    (_write_openvino if runtime == "openvino" else _write_onnx)(model, tower, directory / FILES[runtime], half)
    return sum(path.stat().st_size for path in set(directory.iterdir()) - before)


def require_writer(runtime: Runtime) -> Any:
    """The package that writes a runtime's file; ConfigError, naming the extra, where it is not installed."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # see engines/vision_file.py
    try:
        import onnx  # both are made from one graph

        if runtime == "openvino":
            import openvino

            return openvino
        return onnx
    except ImportError as error:
        raise ConfigError(f"writing {FILES[runtime]} needs an extra: pip install 'llama3v[{runtime}]'") from error


def facts_of(model: Llama3VForConditionalGeneration, tower: SiglipTower) -> VisionFacts:
    """What goes into the metadata."""
    return VisionFacts(
        tile_size=tower.tile_size,
        mean=tuple(tower.mean),
        std=tuple(tower.std),
        tokens_per_tile=model.tokens_per_tile,
        hidden=model.config.text_config.hidden_size,
        digest=digest_of(model),
    )


def digest_of(model: Llama3VForConditionalGeneration) -> str:
    """A hash of the tower's and the projector's weights in float32: which files are of one model?"""
    import xxhash

    digest = xxhash.xxh3_128()
    for part in (model.vision, model.projector):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _write_openvino(model: Llama3VForConditionalGeneration, tower: SiglipTower, path: Path, half: bool) -> None:
    """From the ONNX graph: as fast as OpenVINO's conversion of the torch modules, and made in a tenth of the time."""
    openvino = require_writer("openvino")
    with TemporaryDirectory(dir=path.parent) as work:
        _save_onnx(vision_graph(tower, model.projector, half=False), Path(work) / "vision.onnx")
        converted = openvino.convert_model(Path(work) / "vision.onnx")
        for name, text in facts_of(model, tower).texts().items():
            converted.set_rt_info(text, [OUR_KEYS, name])
        openvino.save_model(converted, path, compress_to_fp16=half)
        del converted  # it has the weights mapped


def _write_onnx(model: Llama3VForConditionalGeneration, tower: SiglipTower, path: Path, half: bool) -> None:
    proto = vision_graph(tower, model.projector, half=half)
    for name, text in facts_of(model, tower).texts().items():
        proto.metadata_props.add(key=f"{OUR_KEYS}.{name}", value=text)
    _save_onnx(proto, path)


def _save_onnx(proto: Any, path: Path) -> None:
    import onnx

    size = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    outside = size > _LARGEST_PROTOBUF
    onnx.save_model(proto, path, save_as_external_data=outside, location=f"{path.name}.data" if outside else None)

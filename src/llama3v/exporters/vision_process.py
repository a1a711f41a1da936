"""Run as a program by exporters/vision_check.py: what does a runtime alone make of a vision file?

    python -P vision_process.py vision.xml|vision.onnx PIXELS.safetensors VISUAL_TOKENS.safetensors

Each array float32 [tiles, 3, S, S] of the first becomes one [visual tokens, hidden] of the second.
"""

import sys

for package in ("llama3v", "torch", "transformers", "openvino_telemetry"):
    sys.modules[package] = None  # type: ignore[assignment] # from here on, importing it fails

from safetensors.numpy import load_file, save_file  # noqa: E402 (the lines above come first)


def main(file: str, pixels_file: str, outputs_file: str) -> None:
    outputs = {}
    if file.endswith(".xml"):
        import openvino

        compiled = openvino.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for name, pixels in load_file(pixels_file).items():  # all tiles of a case at once
        if file.endswith(".xml"):
            visual = compiled([pixels])["visual_tokens"]
        else:
            visual = session.run(["visual_tokens"], {"pixel_values": pixels})[0]
        outputs[name] = visual.reshape(-1, visual.shape[-1]).copy()
    save_file(outputs, outputs_file)


if __name__ == "__main__":
    main(*sys.argv[1:])

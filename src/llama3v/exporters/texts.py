"""The texts of a stock directory, the chat template and the README, and the README of a vision file."""

from collections.abc import Sequence

from llama3v.engines.vision_file import FILES, Runtime, VisionFacts
from llama3v.model.prompt import Turn

# format -> what stands at the begin of a prompt, before a role, after a role, and at the end of a turn. The same as
# model/prompt.py writes; tests/parity/test_fold.py and the export's own check compare the ids of both.
_PIECES = {
    "llama3": (r"<|begin_of_text|>", r"<|start_header_id|>", r"<|end_header_id|>\n\n", r"<|eot_id|>"),
    "chatml": ("", r"<|im_start|>", r"\n", r"<|im_end|>\n"),
}

# An image item may carry "columns" and "rows": then its slices follow the overview, each an <image> of its own.
_TEMPLATE = """\
{{- 'BEGIN' -}}
{%- for message in messages -%}
    {{- 'BEFORE_ROLE' + message['role'] + 'AFTER_ROLE' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] | trim -}}
    {%- else -%}
        {%- set turn = namespace(text='') -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{- '<image>\\n' -}}
                {%- set columns = item['columns'] | default(1) -%}
                {%- set rows = item['rows'] | default(1) -%}
                {%- if columns * rows > 1 -%}
                    {%- for row in range(rows) -%}
                        {%- for column in range(columns) -%}
                            {{- ',<image>' if column else '<image>' -}}
                        {%- endfor -%}
                        {{- '\\n' -}}
                    {%- endfor -%}
                {%- endif -%}
            {%- elif item['type'] == 'text' -%}
                {%- set turn.text = turn.text + item['text'] -%}
            {%- endif -%}
        {%- endfor -%}
        {{- turn.text | trim -}}
    {%- endif -%}
    {{- 'END_OF_TURN' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'BEFORE_ROLEassistantAFTER_ROLE' -}}
{%- endif -%}
"""


def chat_template(prompt_format: str) -> str:
    """A Jinja template that writes a conversation as model/prompt.py does: a turn's images first, then its text."""
    begin, before_role, after_role, end_of_turn = _PIECES[prompt_format]
    return (
        _TEMPLATE.replace("BEGIN", begin)
        .replace("BEFORE_ROLE", before_role)
        .replace("AFTER_ROLE", after_role)
        .replace("END_OF_TURN", end_of_turn)
    )


def as_text(prompt_format: str, turns: Sequence[Turn]) -> str:
    """Turns without images as `chat_template` writes them, up to the answer."""
    begin, before_role, after_role, end_of_turn = (piece.replace(r"\n", "\n") for piece in _PIECES[prompt_format])
    written = [f"{before_role}{turn.role}{after_role}{turn.text.strip()}{end_of_turn}" for turn in turns]
    return begin + "".join(written) + before_role + "assistant" + after_role


_README = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
---
# A Llama 3-V in stock form
{built_with}
A vision tower, a projection block of two self-attention blocks and a Llama, written as a stock {form} checkpoint by
`llama3v export`. It loads without that package:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(".")
processor = AutoProcessor.from_pretrained(".")  # pip install {needs}
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is this?"}}]}}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=prompt, images=[image], return_tensors="pt")
print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

- One `<image>` is one tile of {tile_size} x {tile_size} pixels and becomes {tokens_per_tile} visual tokens. The processor resizes the
  whole picture to one tile, the overview.
- For small print and detail, cut the picture into columns x rows slices as well. Give the image item the entries
  `"columns"` and `"rows"`, and the processor the tiles as separate images: the overview first, then the slices row by row.
- Without the processor: `pixel_values` is [1, tiles, 3, {tile_size}, {tile_size}], and the prompt holds {tokens_per_tile} `<image>` tokens per tile.
"""

_FRAMING_NOTE = """\
- This form's processor writes framing tokens around each image, which the model was not trained with. Prefer token ids
  of your own, without framing, or export the smolvlm form.
"""


def readme(form: str, tile_size: int, tokens_per_tile: int, built_with: str | None) -> str:
    """How to load the directory. `built_with`: the sentence that the licence of the base asks for."""
    text = _README.format(
        form=form,
        tile_size=tile_size,
        tokens_per_tile=tokens_per_tile,
        built_with=f"\n{built_with}\n" if built_with else "",
        needs="num2words torchvision" if form == "smolvlm" else "torchvision",
    )
    return text + (_FRAMING_NOTE if form == "idefics3" else "")


_VISION_README = """\
---
library_name: {library}
pipeline_tag: image-feature-extraction
---
# The eyes of a Llama 3-V
{built_with}
Vision tower and projector as one model, `{file}`, written by `llama3v export`. A tile of an image goes in, and out come
the visual tokens that its language model reads: embeddings of that model, {tokens_per_tile} for each tile, {hidden} numbers each.

```python
{program}
```

- Input `pixel_values`: float32 [tiles, 3, {tile_size}, {tile_size}], any number of tiles; (value / 255 - mean) / std of each
  channel, with mean {mean} and std {std}.
- Output `visual_tokens`: float32 [tiles, {tokens_per_tile}, {hidden}].
- An image is its overview, resized to one tile as above. For detail, also resize it to columns x rows tiles and cut it
  into slices; `llama3v ask` shows both to the model, and says how in its documentation.
- The same facts stand in the file's metadata, under `llama3v`.
"""

_VISION_PROGRAMS = {
    "openvino": """\
import numpy as np
import openvino
from PIL import Image

photo = Image.open("photo.jpg").convert("RGB").resize(({tile_size}, {tile_size}), Image.Resampling.BICUBIC)
pixels = (np.asarray(photo, np.float32) / 255 - {mean}) / {std}
tiles = pixels.transpose(2, 0, 1)[None].astype(np.float32)
visual_tokens = openvino.compile_model("vision.xml", "CPU")([tiles])["visual_tokens"]
print(visual_tokens.shape)""",
    "onnxruntime": """\
import numpy as np
import onnxruntime
from PIL import Image

photo = Image.open("photo.jpg").convert("RGB").resize(({tile_size}, {tile_size}), Image.Resampling.BICUBIC)
pixels = (np.asarray(photo, np.float32) / 255 - {mean}) / {std}
tiles = pixels.transpose(2, 0, 1)[None].astype(np.float32)
session = onnxruntime.InferenceSession("vision.onnx")
visual_tokens = session.run(["visual_tokens"], {{"pixel_values": tiles}})[0]
print(visual_tokens.shape)""",
}


def vision_readme(runtime: Runtime, facts: VisionFacts, built_with: str | None) -> str:
    """How to run a vision file. `built_with`: the sentence that the licence of the base asks for."""
    values = {name: getattr(facts, name) for name in ("tile_size", "mean", "std", "tokens_per_tile", "hidden")}
    return _VISION_README.format(
        library="openvino" if runtime == "openvino" else "onnx",
        file=FILES[runtime],
        program=_VISION_PROGRAMS[runtime].format(**values),
        built_with=f"\n{built_with}\n" if built_with else "",
        **values,
    )


_MLX_README = """\
---
library_name: mlx
pipeline_tag: image-text-to-text
---
# A Llama 3-V for MLX
{built_with}
A vision tower, a projection block of two self-attention blocks and a Llama, written by `llama3v export` and converted by
mlx-vlm, which runs it:

```bash
pip install mlx-vlm
python -m mlx_vlm generate --model . --image photo.jpg --prompt "What is on the table?"
```

- One `<image>` is one tile of {tile_size} x {tile_size} pixels and becomes {tokens_per_tile} visual tokens: the whole picture, resized.
- Slices for small print and detail are further images, the overview first. mlx-vlm does not make them; `llama3v ask
  --engine mlx` does, with the model directory that this was exported from.
"""


def mlx_readme(tile_size: int, tokens_per_tile: int, built_with: str | None) -> str:
    """How to run the directory. `built_with`: the sentence that the licence of the base asks for."""
    sentence = f"\n{built_with}\n" if built_with else ""
    return _MLX_README.format(tile_size=tile_size, tokens_per_tile=tokens_per_tile, built_with=sentence)

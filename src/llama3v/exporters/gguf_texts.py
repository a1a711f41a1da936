"""The two texts beside a GGUF pair: Ollama's Modelfile and the README."""

# format -> before a role, after it, and at the end of a turn. The begin token is none of the template's: Ollama and
# llama.cpp write it where the GGUF file says so (`tokenizer.ggml.add_bos_token`), and a second one would be an error.
_PIECES = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "\n", "<|im_end|>\n"),
}

_MODELFILE = """\
# ollama create my-llama-3-v -f Modelfile
FROM ./model.gguf
FROM ./mmproj.gguf
TEMPLATE \"\"\"{template}\"\"\"
{stops}
PARAMETER temperature 0
"""


def modelfile(prompt_format: str, stops: list[str], base: str | None) -> str:
    """What `ollama create` reads. stops: names of the tokens that end an answer. base: as licence.base_of has it."""
    before, after, end = _PIECES[prompt_format]
    template = f"{{{{- range .Messages }}}}{before}{{{{ .Role }}}}{after}{{{{ .Content }}}}{end}{{{{ end }}}}{before}assistant{after}"
    text = _MODELFILE.format(template=template, stops="\n".join(f'PARAMETER stop "{stop}"' for stop in stops))
    return text + (f'LICENSE """{base} Community License; see NOTICE"""\n' if base else "")


_README = """\
---
library_name: gguf
pipeline_tag: image-text-to-text
---
# A Llama 3-V for llama.cpp
{built_with}
`model.gguf` is the language model, `mmproj.gguf` a vision tower with its projector; `llama3v export` wrote both.

```bash
llama3v ask photo.jpg "What is on the table?" --model .
llama-server -m model.gguf --mmproj mmproj.gguf
ollama create my-llama-3-v -f Modelfile
```

- `llama3v ask` gives the model what it was trained with: an overview of the picture, slices for detail, and no marks
  around them. A tile of {tile_size} x {tile_size} pixels becomes {tokens_per_tile} visual tokens.
- Stock programs cut and mark pictures in their own way (that of Idefics3), which this model was not trained with. They
  run it, and answers about large or detailed pictures are worse.
"""


def readme(tile_size: int, tokens_per_tile: int, built_with: str | None) -> str:
    """How to run the pair. `built_with`: the sentence that the licence of the base asks for."""
    sentence = f"\n{built_with}\n" if built_with else ""
    return _README.format(tile_size=tile_size, tokens_per_tile=tokens_per_tile, built_with=sentence)

"""What Ollama writes around a conversation, by the Modelfile and the GGUF file, is what the model was trained with."""

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from llama3v.config import ExportConfig
from llama3v.engines.gguf_fields import read_fields
from llama3v.exporters.verbs import export
from llama3v.model.llama3v import load_model, save_model
from llama3v.model.prompt import Renderer, Turn

pytest.importorskip("gguf", reason="needs the extra llama3v[gguf]")
pytest.importorskip("xllamacpp", reason="needs the extra llama3v[llamacpp]")

CHATML = {"<|start_header_id|>": "<|im_start|>", "<|eot_id|>": "<|im_end|>", "<|end_of_text|>": "<|endoftext|>"}
"""Control tokens of the tiny tokenizer, renamed to be a tokenizer of SmolLM2's kind; its begin token is <|im_start|>."""
TURNS = [Turn("system", "Be brief."), Turn("user", "What?"), Turn("assistant", "A star."), Turn("user", "And here?")]


def as_ollama_writes(pair: Path, turns: list[Turn]) -> str:
    """The Modelfile's template, which is a loop over messages, after the token that the GGUF file asks for."""
    fields = read_fields(pair / "model.gguf")
    begin = fields["tokenizer.ggml.tokens"][fields["tokenizer.ggml.bos_token_id"]]
    (template,) = re.findall('TEMPLATE """(.*)"""', (pair / "Modelfile").read_text(), re.DOTALL)
    loop = re.fullmatch(r"\{\{- range \.Messages \}\}(.*)\{\{ end \}\}(.*)", template, re.DOTALL)
    assert loop is not None
    message, end = loop.groups()
    written = [message.replace("{{ .Role }}", turn.role).replace("{{ .Content }}", turn.text) for turn in turns]
    return "".join([begin if fields["tokenizer.ggml.add_bos_token"] else "", *written, end])


@pytest.mark.parametrize("prompt_format", ["llama3", "chatml"])
def test_ollama_writes_the_prompt_that_the_model_was_trained_with(
    prompt_format: str, tiny_model_dir: Path, tiny_tokenizer, tmp_path: Path
) -> None:
    model, tokenizer = load_model(tiny_model_dir)
    if prompt_format == "chatml":
        named = str(tiny_tokenizer.backend_tokenizer.to_str())
        for theirs, ours in CHATML.items():
            named = named.replace(theirs, ours)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(named), bos_token="<|im_start|>")
        model.config.prompt_format = "chatml"
    save_model(model, tokenizer, tmp_path / "model")
    pair = tmp_path / "pair"
    export(ExportConfig(out=pair, model=str(tmp_path / "model"), format="gguf", tower="none", check=False))
    renderer = Renderer(tokenizer, prompt_format, model.tokens_per_tile, model.config.image_token_id)
    ours = tokenizer.decode(renderer.render(TURNS, generate=True).ids)
    assert as_ollama_writes(pair, TURNS) == ours
    assert ours.startswith("<|begin_of_text|>") == (prompt_format == "llama3")

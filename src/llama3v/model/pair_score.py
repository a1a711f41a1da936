"""Do this image and this text belong together? The probability that SigLIP was trained to give for each pair alone.

    probability = sigmoid(exp(t) * <image, text> + b), image and text embeddings of length 1

(Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023, equation 1.) No softmax over a batch: other pairs
do not change it. It needs both halves of a SigLIP; a tower alone cannot read text.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llama3v.errors import CheckpointError, DataError
from llama3v.model.tiles import make_tiles, to_pixels
from llama3v.model.vision import SIGLIP_MEAN, SIGLIP_STD


class PairScorer:
    """A whole SigLIP (fixed-size, version 1 or 2) with its tokenizer. Make one with `from_pretrained`."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.tile_size: int = model.config.vision_config.image_size
        self.text_tokens: int = model.config.text_config.max_position_embeddings

    @classmethod
    def from_pretrained(cls, name_or_directory: str | Path) -> "PairScorer":
        """Load a SigLIP with both halves from a hub name or a directory, in fp32.

        Raises:
            CheckpointError: nothing there, a vision half only, or another kind of model.
        """
        from transformers import AutoConfig, AutoTokenizer, SiglipModel

        try:
            kind = AutoConfig.from_pretrained(name_or_directory).model_type
            if kind != "siglip":
                what = "only a vision half" if kind == "siglip_vision_model" else f"a {kind!r} model"
                raise CheckpointError(
                    f"{name_or_directory} holds {what}; scoring pairs needs a SigLIP with its text half (model_type siglip)"
                )
            model = SiglipModel.from_pretrained(name_or_directory, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(name_or_directory)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"no SigLIP at {name_or_directory}: {str(error).splitlines()[0]}") from error
        return cls(model.eval(), tokenizer)

    @torch.no_grad()
    def score(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """Probability that each image and each text belong together: float32 [images, texts].

        Args:
            images: RGB pictures; each is resized directly to one tile, as in training.
            texts: cut at the text half's length (64 tokens in the published models).
        """
        if not images or not texts:
            raise DataError(f"expected at least one image and one text, found {len(images)} and {len(texts)}")
        tiles = np.concatenate([make_tiles(image, self.tile_size, max_tiles=0).pixels for image in images])
        # SigLIP was trained without an attention mask: text is padded to the full length, and all of it is read.
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.text_tokens,
            truncation=True,
            return_attention_mask=False,
            return_tensors="pt",
        )
        outputs = self.model(input_ids=tokens["input_ids"], pixel_values=to_pixels(tiles, SIGLIP_MEAN, SIGLIP_STD))
        return torch.sigmoid(outputs.logits_per_image)  # [images, texts]

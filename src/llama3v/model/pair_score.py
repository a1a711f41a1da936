"""Do this image and this text belong together? The probability that SigLIP was trained to give for each pair alone.

    probability = sigmoid(exp(t) * <image, text> + b), image and text embeddings of length 1

(Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023, equation 1.) No softmax over a batch: other pairs
do not change it. It needs both halves of a SigLIP; a tower alone cannot read text.

The image is its overview tile. Its embedding may start from pixels, or from patch features behind any layer, as the
feature cache holds them: then only the rest of the vision half runs.

The text half reads few tokens (64 in the published models). A longer text is cut into pieces that it can read
(text_pieces.py), and its probability is the mean of theirs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from llama3v.errors import CheckpointError, DataError
from llama3v.model.text_pieces import cut_text
from llama3v.model.tiles import make_tiles, to_pixels
from llama3v.model.vision import SIGLIP_MEAN, SIGLIP_STD, load_stock, refuse_missing

SCORING_VERSION = "1"
"""Of all that decides a score beside the weights: the picture is the overview tile, and how long texts are read."""

_PROBE = "The 2 Quick Brown Foxes, ÉTÉ (a test)!"


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
            CheckpointError: nothing there, a vision half only, another kind of model, tensors that are missing, or a
                tokenizer that needs a package.
        """
        from transformers import AutoConfig, AutoTokenizer, SiglipModel

        try:
            kind = AutoConfig.from_pretrained(name_or_directory).model_type
            if kind != "siglip":
                what = "only a vision half" if kind == "siglip_vision_model" else f"a {kind!r} model"
                raise CheckpointError(
                    f"{name_or_directory} holds {what}; scoring pairs needs a SigLIP with its text half (model_type siglip)"
                )
            model, missing = load_stock(SiglipModel, name_or_directory)
            tokenizer = AutoTokenizer.from_pretrained(name_or_directory)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"no SigLIP at {name_or_directory}: {str(error).splitlines()[0]}") from error
        except ImportError as error:
            raise CheckpointError(
                f"the tokenizer of {name_or_directory} needs packages that are not installed: pip install 'llama3v[score]'"
            ) from error
        refuse_missing(name_or_directory, missing)
        if not model.vision_model.use_head:
            raise CheckpointError(f"{name_or_directory} has no attention-pooling head, so no image embedding; no score")
        return cls(model.requires_grad_(False).eval(), tokenizer)

    def to(self, device: torch.device) -> "PairScorer":
        """Compute there from now on. Results are on the CPU all the same."""
        self.model.to(device)
        return self

    def identity(self, cut: int) -> dict[str, str]:
        """What scores depend on, in words, beside the features behind layer `cut` (0: the tile itself)."""
        return {
            "scoring": SCORING_VERSION,
            "text_tokens": str(self.text_tokens),
            "tokenizer": self._tokenizer_digest(),
            "weights": self._weights_digest(cut),
        }

    def forget_trunk(self, cut: int) -> None:
        """Free the memory of the layers up to `cut`, where only features behind it are going to be embedded."""
        vision = self.model.vision_model
        vision.embeddings = nn.Identity()
        for number in range(cut):
            vision.encoder.layers[number] = nn.Identity()

    @torch.no_grad()
    def score(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """Probability that each image and each text belong together: float32 [images, texts].

        Args:
            images: RGB pictures; each is resized directly to one tile, as in training.
            texts: of any length; see above.
        """
        if not images or not texts:
            raise DataError(f"expected at least one image and one text, found {len(images)} and {len(texts)}")
        tiles = np.concatenate([make_tiles(image, self.tile_size, max_tiles=0).pixels for image in images])
        embedded = self.embed_tiles(tiles)
        columns = [self.probabilities(embedded, self.embed_texts(self.pieces(text))).mean(dim=1) for text in texts]
        return torch.stack(columns, dim=1)

    @torch.no_grad()
    def embed_tiles(self, tiles: np.ndarray) -> Tensor:
        """Embeddings of whole pictures: uint8 [n, S, S, 3] RGB -> fp32 [n, width], of length 1."""
        pixels = to_pixels(tiles, SIGLIP_MEAN, SIGLIP_STD).to(self._device)
        return F.normalize(self.model.vision_model(pixels).pooler_output, dim=-1).cpu()

    @torch.no_grad()
    def embed_features(self, features: Tensor, cut: int) -> Tensor:
        """The same from patch features behind layer `cut`: [n, patches, width] of any float type -> fp32 [n, width]."""
        vision = self.model.vision_model
        x = features.to(self._device, torch.float32)
        for layer in vision.encoder.layers[cut:]:
            x = layer(x, None)
        return F.normalize(vision.head(vision.post_layernorm(x)), dim=-1).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts, each of which fits (`pieces`): fp32 [texts, width], of length 1."""
        # SigLIP was trained without an attention mask: text is padded to the full length, and all of it is read.
        ids = self.tokenizer(
            [_encodable(text) for text in texts],
            padding="max_length",
            max_length=self.text_tokens,
            truncation=False,
            return_attention_mask=False,
            return_tensors="pt",
        )["input_ids"]
        return F.normalize(self.model.text_model(ids.to(self._device)).pooler_output, dim=-1).cpu()

    def pieces(self, text: str) -> list[str]:
        """The text, or where it is longer than the text half reads, its pieces."""
        return cut_text(text, lambda part: self._count(part) <= self.text_tokens)

    def probabilities(self, images: Tensor, texts: Tensor) -> Tensor:
        """[images, texts] from embeddings [images, width] and [texts, width]."""
        scale, bias = self.model.logit_scale.detach().cpu().exp(), self.model.logit_bias.detach().cpu()
        return torch.sigmoid(images @ texts.T * scale + bias)

    @property
    def _device(self) -> torch.device:
        return self.model.logit_scale.device

    def _count(self, text: str) -> int:
        ids = self.tokenizer(_encodable(text), return_attention_mask=False, truncation=False, verbose=False)[
            "input_ids"
        ]
        return len(ids)

    def _tokenizer_digest(self) -> str:
        """Of its vocabulary, and of what it makes of a text with capitals, digits, accents and punctuation."""
        ids = self.tokenizer(_PROBE, return_attention_mask=False)["input_ids"]
        content = repr((sorted(self.tokenizer.get_vocab().items()), ids, self.tokenizer.pad_token_id))
        return xxhash.xxh3_128(content.encode(errors="surrogatepass")).hexdigest()

    def _weights_digest(self, cut: int) -> str:
        below = [f"vision_model.encoder.layers.{number}." for number in range(cut)]
        below += ["vision_model.embeddings."] if cut else []
        digest = xxhash.xxh3_128()
        for name, tensor in sorted(self.model.named_parameters()):
            if not name.startswith(tuple(below)):
                digest.update(name.encode())
                digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
        return digest.hexdigest()


def _encodable(text: str) -> str:
    """A lone surrogate, which a damaged data set may have, is in no tokenizer's alphabet."""
    return text.encode(errors="replace").decode()

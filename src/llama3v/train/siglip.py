"""SigLIP training at small size: the sigmoid loss, with a captioning head that helps, as in SigLIP 2.

Source of the loss: "Sigmoid Loss for Language Image Pre-Training", arXiv 2303.15343, algorithm 1.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, SiglipModel

from llama3v.model.projector import Projector

INITIAL_LOGIT_SCALE = math.log(10.0)  # the paper's t' and b; transformers starts both at 0, which trains badly
INITIAL_LOGIT_BIAS = -10.0


def sigmoid_loss(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """Each pair of the batch is a yes/no question of its own.

    Args:
        image, text: L2-normalised embeddings [batch, width]; row i of both belongs together.
        logit_scale: t' (its exponential multiplies the cosine). logit_bias: b.

    Returns: mean over images of the sum over texts of -log sigmoid(y * logit), y = +1 on the diagonal, else -1.
    """
    logits = image @ text.T * logit_scale.exp() + logit_bias
    signs = 2 * torch.eye(len(logits), device=logits.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum(dim=-1).mean()


class CaptioningHead(nn.Module):
    """A small causal language model that captions from the features that the cache will hold.

    It reads them as a Llama 3-V does, through norm, unshuffle and linear layer (a projector without blocks), so the
    encoder learns to put what matters where the projector finds it. It is thrown away after training.
    """

    def __init__(
        self, *, width: int, heads: int, mlp_size: int, grid_side: int, scale_factor: int, vocabulary: int
    ) -> None:
        super().__init__()
        self.reader = Projector(
            width=width,
            heads=heads,
            mlp_size=mlp_size,
            grid_side=grid_side,
            scale_factor=scale_factor,
            hidden=width,
            blocks=0,
        )
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            tie_word_embeddings=True,
        )
        self.decoder = LlamaForCausalLM(config)

    def forward(self, features: Tensor, tokens: Tensor, pad: int) -> tuple[Tensor, Tensor]:
        """Captioning loss and the share of captions of which every token is right (teacher forcing).

        Args: features [n, patches, width]; tokens [n, length], begin token first, padded at the end with `pad`.
        """
        prefix = self.reader(features)  # [n, visual tokens, width]
        embeddings = self.decoder.get_input_embeddings()(tokens[:, :-1])
        hidden = self.decoder.model(inputs_embeds=torch.cat([prefix, embeddings], dim=1)).last_hidden_state
        logits = self.decoder.lm_head(hidden[:, prefix.shape[1] :])  # [n, length - 1, vocabulary]
        targets = tokens[:, 1:]
        real = targets != pad
        loss = F.cross_entropy(logits[real], targets[real])
        right = ((logits.argmax(-1) == targets) | ~real).all(dim=-1)
        return loss, right.float().mean()


def embed_pairs(model: SiglipModel, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Image embedding, text embedding (both [n, width], normalised) and the penultimate layer's features."""
    vision = model.vision_model(pixels, output_hidden_states=True)
    text = model.text_model(tokens)
    return (
        F.normalize(vision.pooler_output, dim=-1),
        F.normalize(text.pooler_output, dim=-1),
        vision.hidden_states[-2],
    )

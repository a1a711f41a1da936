"""Make the embedded default's pretrained parts: a tiny SigLIP and a tiny Llama, seeded, with their training logs.

    python scripts/make_assets.py tokenizer
    python scripts/make_assets.py siglip --threads 1 --steps 2500 --stop-after 2000
    python scripts/make_assets.py llama --threads 1 --steps 1800 --stop-after 1500 --batch 14 --learning-rate 2e-3
    python scripts/make_assets.py llama --lookups --steps 900 --stop-after 450 --batch 9 --row 384 --learning-rate 2e-3 --seed 1
    python scripts/make_assets.py llama --lookups --steps 750 --batch 9 --row 384 --learning-rate 1.5e-3 --seed 2

Output: src/llama3v/assets/{siglip,llama}-scenes and scripts/logs/. The logs state the seconds each took on a machine
that was shared with other work; siglip and llama may run at the same time, one core each.

The committed logs are those of the carried weights: siglip.jsonl, and llama-1 to llama-3.jsonl for the three parts of the
LLM. These commands do NOT give the carried LLM again: its documents and the mix of them were still being changed between
the parts. Part 1: merged facts without places in 65% of the documents, 30% sheets (some of three pages), a caption in
every document. Part 2: with places, 80% merged, 30% sheets, captions in 20%. Part 3: as the code stands now. Parts 1 and
2 ran on past the step whose weights were kept (1500 and 450), which their logs show.
"""

import json
import math
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

from llama3v.data.synthetic.documents import Document, make_document
from llama3v.data.synthetic.language import caption, name_item, place_of_item
from llama3v.data.synthetic.scenes import SCENE_SIZE, draw, make_scene
from llama3v.model.tiles import to_pixels
from llama3v.train.batches import attention_mask
from llama3v.train.siglip import INITIAL_LOGIT_BIAS, INITIAL_LOGIT_SCALE, CaptioningHead, embed_pairs, sigmoid_loss

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT / "src/llama3v/assets"
LOGS = ROOT / "scripts/logs"
SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>")
VOCABULARY = 640
TEXT_LENGTH = 64  # of the text tower
VISION = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "image_size": SCENE_SIZE,
    "patch_size": 12,
}
TEXT = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY,
    "max_position_embeddings": TEXT_LENGTH, "projection_size": 192,
}  # fmt: skip
LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "initializer_range": 0.088,  # 1 / sqrt(hidden): at 0.02 attention starts uniform at this width and learns to look late
}  # fmt: skip


@dataclass
class Options:
    """What to make."""

    part: tyro.conf.Positional[Literal["tokenizer", "siglip", "llama"]]
    """Which asset; the tokenizer comes first."""
    steps: int = 3000
    """Optimizer steps."""
    batch: int = 64
    """Scenes, or packed rows of documents, in a step."""
    row: int = 256
    """Positions in a packed row of documents."""
    stop_after: int | None = None
    """Stop at this step of the schedule (the encoder captioned without a mistake long before its last step)."""
    lookups: bool = False
    """Llama's second part: go on from the first part's weights, with more questions and few captions a document."""
    learning_rate: float = 1.5e-3
    """Peak; linear warm-up over 5% of the steps, then a cosine to zero."""
    seed: int = 0
    """Seed of weights and data."""
    threads: int = 2
    """CPU threads."""
    save_every: int = 500
    """Steps between saved states (the last is what is kept)."""
    out: Path = ASSETS
    """Where the directories go."""


def make_tokenizer(out: Path) -> None:
    """Byte-level BPE over the scenes' language, with Llama 3's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    corpus = []
    for number in range(4000):
        document = make_document(f"tokenizer/{number}")
        corpus += [part for part in document.prefix if isinstance(part, str)]
        corpus += [text for turn in document.turns for text in turn] + ["user", "assistant", "system", "\n\n"]
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[4], pad_token=SPECIAL[5]
    )
    print(f"{len(wrapped)} tokens; a caption: {wrapped.tokenize(caption(make_scene('a')))}")
    for name in ("llama-scenes", "siglip-scenes"):
        if name == "siglip-scenes":  # the text tower reads a begin and an end token; prompts bring their own
            ends = [(token, wrapped.convert_tokens_to_ids(token)) for token in (SPECIAL[0], SPECIAL[4])]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{SPECIAL[0]} $A {SPECIAL[4]}", special_tokens=ends
            )
            wrapped = PreTrainedTokenizerFast(
                tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[4], pad_token=SPECIAL[5]
            )
        wrapped.model_max_length = TEXT_LENGTH if name == "siglip-scenes" else LLAMA["max_position_embeddings"]
        wrapped.save_pretrained(out / name)


class Log:
    """Prints and keeps JSON lines: step, seconds, losses."""

    def __init__(self, name: str, options: Options) -> None:
        LOGS.mkdir(parents=True, exist_ok=True)
        self.file = (LOGS / f"{name}.jsonl").open("w")
        self.start = time.time()
        self.write(options={k: str(v) for k, v in vars(options).items() if k != "out"}, torch=torch.__version__)

    def write(self, **values: object) -> None:
        line = {"seconds": round(time.time() - self.start, 1)} | {
            key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()
        }
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        print(line, flush=True)


def schedule(step: int, steps: int, peak: float) -> float:
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def optimizer_for(modules: list[torch.nn.Module]) -> torch.optim.Optimizer:
    parameters = [p for module in modules for p in module.parameters()]
    decay = [p for p in parameters if p.ndim >= 2]
    rest = [p for p in parameters if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.98), fused=True
    )


# ---- SigLIP ----------------------------------------------------------------------------------------------------------


def picture_and_captions(seed: str) -> tuple[np.ndarray, str, str]:
    """A tile, its caption row by row (for the captioning head), and one in free order, maybe in part (for the pairs)."""
    rng = random.Random(seed + "/pair")
    if rng.random() < 0.25:  # one page of a sheet, as slicing cuts it
        scene = make_scene(seed, sheet=True)
        number = rng.randrange(len(scene.pages))
        row, column = divmod(number, scene.columns)
        box = (column * SCENE_SIZE, row * SCENE_SIZE, (column + 1) * SCENE_SIZE, (row + 1) * SCENE_SIZE)
        item = scene.pages[number][0]
        text = f"{name_item(item)} at the {place_of_item(item)}."
        return np.asarray(draw(scene).crop(box)), text, text
    scene = make_scene(seed)
    return np.asarray(draw(scene)), caption(scene), caption(scene, rng)


def tokens_of(tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int | None = None) -> Tensor:
    """[n, length] with begin and end tokens, padded at the end."""
    begin, end, pad = (tokenizer.convert_tokens_to_ids(t) for t in (SPECIAL[0], SPECIAL[4], SPECIAL[5]))
    rows = [[begin, *tokenizer.encode(text, add_special_tokens=False), end] for text in texts]
    length = length or max(map(len, rows))
    return torch.tensor([(row + [pad] * length)[:length] for row in rows])


def siglip_batch(tokenizer: PreTrainedTokenizerFast, seeds: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    pictures, full, free = zip(*(picture_and_captions(seed) for seed in seeds), strict=True)
    pixels = to_pixels(np.stack(pictures), (0.5,) * 3, (0.5,) * 3)
    return pixels, tokens_of(tokenizer, list(full)), tokens_of(tokenizer, list(free), TEXT_LENGTH)


def train_siglip(options: Options) -> None:
    torch.manual_seed(options.seed)
    directory = options.out / "siglip-scenes"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    pad = tokenizer.pad_token_id
    model = SiglipModel(
        SiglipConfig(
            vision_config=VISION,
            text_config=TEXT
            | {"pad_token_id": pad, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id},
        )
    )
    with torch.no_grad():
        model.logit_scale.fill_(INITIAL_LOGIT_SCALE)
        model.logit_bias.fill_(INITIAL_LOGIT_BIAS)
    head = CaptioningHead(width=192, heads=6, mlp_size=512, grid_side=6, scale_factor=2, vocabulary=VOCABULARY)
    optimizer = optimizer_for([model, head])
    log = Log("siglip", options)
    print(
        f"vision {sum(p.numel() for p in model.vision_model.parameters()):,} text {sum(p.numel() for p in model.text_model.parameters()):,}"
    )
    held_out = siglip_batch(tokenizer, [f"held-out/{n}" for n in range(256)])
    for step in range(options.stop_after or options.steps):
        pixels, full, free = siglip_batch(tokenizer, [f"{options.seed}/{step}/{n}" for n in range(options.batch)])
        image, text, features = embed_pairs(model, pixels, free)
        pair_loss = sigmoid_loss(image, text, model.logit_scale, model.logit_bias)
        caption_loss, right = head(features, full, pad)
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, options.steps, options.learning_rate)
        optimizer.zero_grad(set_to_none=True)
        (caption_loss + 0.2 * pair_loss).backward()
        torch.nn.utils.clip_grad_norm_([p for m in (model, head) for p in m.parameters()], 1.0)
        optimizer.step()
        if step % 50 == 49:
            log.write(
                step=step + 1, pair_loss=pair_loss.item(), caption_loss=caption_loss.item(), captions_right=right.item()
            )
        if step % options.save_every == options.save_every - 1 or step == options.steps - 1:
            with torch.no_grad():
                image, text, features = embed_pairs(model, held_out[0], held_out[2])
                held_loss, right = head(features, held_out[1], pad)
                retrieved = (image @ text.T).argmax(-1) == torch.arange(len(image))
            log.write(
                step=step + 1,
                held_out_caption_loss=held_loss.item(),
                held_out_captions_right=right.item(),
                held_out_retrieval=retrieved.float().mean().item(),
            )
            save(model, directory)


def save(model: torch.nn.Module, directory: Path) -> None:
    """Weights in bf16, which halves what the package carries."""
    import copy

    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(directory)


# ---- Llama -----------------------------------------------------------------------------------------------------------


@dataclass
class Positions:
    """One document as the LLM reads it: each position holds one or more tokens; label -100 where nothing is learnt."""

    tokens: list[list[int]]
    labels: list[int]


class Layout:
    """Lays documents out as conversations in Llama 3's format (the segments are those of model/prompt.py)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.ids = lru_cache(100_000)(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False)))
        self.begin, self.start, self.stop, self.end, self.pad = (
            tokenizer.convert_tokens_to_ids(SPECIAL[i]) for i in (0, 2, 3, 4, 5)
        )

    def __call__(self, document: Document) -> Positions:
        tokens: list[list[int]] = [[self.begin]]
        labels = [-100]

        def plain(values: Iterable[int], learn: bool = False) -> None:
            for value in values:
                tokens.append([value])
                labels.append(value if learn else -100)

        for number, (question, answer) in enumerate(document.turns):
            plain([self.start, *self.ids("user"), self.stop, *self.ids("\n\n")])
            for part in document.prefix if number == 0 else ():
                if isinstance(part, str):
                    plain(self.ids(part))
                else:
                    tokens.append([token for word in part for token in self.ids(word)])
                    labels.append(-100)
            if number == 0 and len(document.prefix) == 1:
                plain(self.ids("\n"))
            plain([*self.ids(question), self.end, self.start, *self.ids("assistant"), self.stop, *self.ids("\n\n")])
            plain([*self.ids(answer), self.end], learn=True)
        return Positions(tokens, labels)


@dataclass
class LlamaBatch:
    """Documents side by side in rows. Bags are flat; a merged position's words are weighted 1/sqrt(n), to keep its size."""

    flat: Tensor  # tokens of all bags
    offsets: Tensor  # [rows * length]
    weights: Tensor  # like flat
    labels: Tensor  # [rows, length]
    positions: Tensor  # [rows, length]
    segments: Tensor  # [rows, length], 0 is padding


def llama_batch(documents: list[Positions], row: int, pad: int) -> LlamaBatch:
    """First fit of whole documents into rows of `row` positions, longest first."""
    rows: list[list[Positions]] = []
    for document in sorted(documents, key=lambda document: -len(document.labels)):
        size = len(document.labels)
        place = next((r for r in rows if sum(len(d.labels) for d in r) + size <= row), None)
        if place is None:
            rows.append(place := [])
        place.append(document)
    bags: list[list[int]] = []
    labels, positions, segments = (torch.full((len(rows), row), fill) for fill in (-100, 0, 0))
    for number, documents_of_row in enumerate(rows):
        begin = 0
        for segment, document in enumerate(documents_of_row, start=1):
            place_of = slice(begin, begin + len(document.labels))
            bags += document.tokens
            labels[number, place_of] = torch.tensor(document.labels)
            positions[number, place_of] = torch.arange(len(document.labels))
            segments[number, place_of] = segment
            begin = place_of.stop
        bags += [[pad]] * (row - begin)
    sizes = torch.tensor([len(bag) for bag in bags])
    return LlamaBatch(
        flat=torch.tensor([token for bag in bags for token in bag]),
        offsets=sizes.cumsum(0) - sizes,
        weights=sizes.float().rsqrt().repeat_interleave(sizes),
        labels=labels,
        positions=positions,
        segments=segments,
    )


def llama_loss(model: LlamaForCausalLM, batch: LlamaBatch) -> tuple[Tensor, Tensor]:
    """Mean loss over what is learnt, and the share of those tokens that are right."""
    table = model.get_input_embeddings().weight
    embeddings = F.embedding_bag(batch.flat, table, batch.offsets, per_sample_weights=batch.weights, mode="sum").view(
        *batch.labels.shape, -1
    )
    hidden = model.model(
        inputs_embeds=embeddings,
        attention_mask=attention_mask(batch.segments),
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state[:, :-1]
    targets = batch.labels[:, 1:]
    learnt = targets != -100
    logits = model.lm_head(hidden[learnt])
    return F.cross_entropy(logits, targets[learnt]), (logits.argmax(-1) == targets[learnt]).float().mean()


def train_llama(options: Options) -> None:
    torch.manual_seed(options.seed)
    directory = options.out / "llama-scenes"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if options.lookups:
        model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    else:
        model = LlamaForCausalLM(LlamaConfig(**LLAMA, **ids))
    optimizer = optimizer_for([model])
    log = Log("llama-lookups" if options.lookups else "llama", options)
    print(f"{model.num_parameters():,} parameters")

    layout = Layout(tokenizer)

    def batch_of(prefix: str, tokens: int, share: float = 1.0) -> LlamaBatch:
        """Documents grow in the first third of training: looking a fact up is learnt sooner among few facts."""
        size = next((size for until, size in ((0.10, 1), (0.2, 2), (0.33, 3)) if share < until), 9)
        asked, captions, sheets = min(size + 2, 6), 1.0, 0.3
        if options.lookups:
            size = next((size for until, size in ((0.2, 2), (0.5, 3)) if share < until), 9)
            asked, captions, sheets = min(2 * size, 10), 0.1, 0.12
        documents: list[Positions] = []
        while sum(len(document.labels) for document in documents) < tokens:
            documents.append(layout(make_document(f"{prefix}/{len(documents)}", size, asked, captions, sheets)))
        return llama_batch(documents, options.row, layout.pad)

    held_out = batch_of("held-out", 20_000)
    for step in range(options.stop_after or options.steps):
        loss, right = llama_loss(
            model, batch_of(f"{options.seed}/{step}", options.batch * options.row, step / options.steps)
        )
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, options.steps, options.learning_rate)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            log.write(step=step + 1, loss=loss.item(), tokens_right=right.item())
        if step % options.save_every == options.save_every - 1 or step == options.steps - 1:
            with torch.no_grad():
                held_loss, right = llama_loss(model, held_out)
            log.write(step=step + 1, held_out_loss=held_loss.item(), held_out_tokens_right=right.item())
            save(model, directory)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(options.threads)
    if options.part == "tokenizer":
        make_tokenizer(options.out)
    else:
        {"siglip": train_siglip, "llama": train_llama}[options.part](options)


if __name__ == "__main__":
    main()

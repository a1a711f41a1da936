"""Make the embedded default's pretrained parts: a tiny SigLIP and a tiny Llama, seeded, with their training logs.

    python scripts/make_assets.py tokenizer
    python scripts/make_assets.py siglip --threads 1 --steps 2500 --stop-after 2000
    python scripts/make_assets.py llama --steps 5000 --batch 12 --row 256 --learning-rate 2e-3

Output: src/llama3v/assets/{siglip,llama}-scenes and scripts/logs/. The logs state the seconds each took on a machine
that was shared with other work.

The committed logs are those of the carried weights. The carried LLM was made by this file as it stands. The carried
encoder was made by commit 14afb96, and the tokenizer by commit 0358b94 (there, the first command gives it byte for byte):
the scenes have other sheets since, and the documents other words, so that run now they give parts of the same kind.
"""

import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
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

from llama3v.data.synthetic.documents import Document, Mixture, make_document
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
    compile: bool = True
    """Llama: torch.compile, which needs a C++ compiler and more than halves the time of a step."""
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
    answers: list[int]  # number of the answer that a learnt position belongs to, else -1
    kinds: tuple[str, ...]  # of the answers


class Layout:
    """Lays documents out as bare lines, or as conversations in Llama 3's format (the segments of model/prompt.py)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.ids = lru_cache(100_000)(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False)))
        self.begin, self.start, self.stop, self.end, self.pad = (
            tokenizer.convert_tokens_to_ids(SPECIAL[i]) for i in (0, 2, 3, 4, 5)
        )

    def __call__(self, document: Document) -> Positions:
        tokens: list[list[int]] = [[self.begin]]
        labels, answers = [-100], [-1]

        def plain(values: Iterable[int], answer: int = -1) -> None:
            for value in values:
                tokens.append([value])
                labels.append(-100 if answer < 0 else value)
                answers.append(answer)

        line = self.ids("\n")
        user: tuple[int, ...] = ()
        between = end_of_answer = line
        if document.conversation:
            user = (self.start, *self.ids("user"), self.stop, *self.ids("\n\n"))
            between = (self.end, self.start, *self.ids("assistant"), self.stop, *self.ids("\n\n"))
            end_of_answer = (self.end,)
        for number, (question, answer) in enumerate(document.turns):
            plain(user)
            for part in document.prefix if number == 0 else ():
                if isinstance(part, str):
                    plain(self.ids(part))
                else:
                    tokens.append([token for word in part for token in self.ids(word)])
                    labels.append(-100)
                    answers.append(-1)
            if number == 0 and len(document.prefix) == 1:
                plain(line)
            if question:  # a note has none
                plain((*self.ids(question), *between))
            plain((*self.ids(answer), *end_of_answer), answer=number)
        return Positions(tokens, labels, answers, document.kinds)


@dataclass
class LlamaBatch:
    """Documents side by side in rows. Bags are flat; a merged position's words are weighted 1/sqrt(n), to keep its size."""

    flat: Tensor  # tokens of all bags
    offsets: Tensor  # [rows * length]
    weights: Tensor  # like flat
    labels: Tensor  # [rows, length]
    answers: Tensor  # [rows, length], number of the answer a learnt position belongs to, else -1
    positions: Tensor  # [rows, length]
    segments: Tensor  # [rows, length], 0 is padding
    kinds: list[str]  # of the answers


def llama_batch(documents: Iterator[Positions], rows: int, length: int, pad: int) -> LlamaBatch:
    """Whole documents into `rows` rows, each into the first that has room, until eight in turn find none.

    The shape never changes, which a compiled model wants. Documents that find no room are left out.
    """
    placed: list[list[Positions]] = [[] for _ in range(rows)]
    room, misses = [length] * rows, 0
    while misses < 8:
        document = next(documents)
        size = len(document.labels)
        number = next((number for number in range(rows) if room[number] >= size), None)
        if number is None:
            misses += 1
            continue
        placed[number].append(document)
        room[number] -= size
        misses = 0
    bags: list[list[int]] = []
    kinds: list[str] = []
    labels, answers, positions, segments = (torch.full((rows, length), fill) for fill in (-100, -1, 0, 0))
    for number, documents_of_row in enumerate(placed):
        begin = 0
        for segment, document in enumerate(documents_of_row, start=1):
            place_of = slice(begin, begin + len(document.labels))
            bags += document.tokens
            labels[number, place_of] = torch.tensor(document.labels)
            answers[number, place_of] = torch.tensor([a + len(kinds) if a >= 0 else -1 for a in document.answers])
            positions[number, place_of] = torch.arange(len(document.labels))
            segments[number, place_of] = segment
            kinds += document.kinds
            begin = place_of.stop
        bags += [[pad]] * (length - begin)
    sizes = torch.tensor([len(bag) for bag in bags])
    return LlamaBatch(
        flat=torch.tensor([token for bag in bags for token in bag]),
        offsets=sizes.cumsum(0) - sizes,
        weights=sizes.float().rsqrt().repeat_interleave(sizes),
        labels=labels,
        answers=answers,
        positions=positions,
        segments=segments,
        kinds=kinds,
    )


Body = Callable[[Tensor, Tensor, Tensor], Tensor]  # embeddings, mask, positions -> hidden states


def body_of(model: LlamaForCausalLM) -> Body:
    def body(embeddings: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        return model.model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state

    return body


def llama_loss(model: LlamaForCausalLM, body: Body, batch: LlamaBatch) -> tuple[Tensor, dict[str, tuple[int, int]]]:
    """Mean loss over what is learnt; and by kind of question, answers right in every token and answers in all."""
    table = model.get_input_embeddings().weight
    embeddings = F.embedding_bag(batch.flat, table, batch.offsets, per_sample_weights=batch.weights, mode="sum").view(
        *batch.labels.shape, -1
    )
    hidden = body(embeddings, attention_mask(batch.segments), batch.positions)[:, :-1]
    targets = batch.labels[:, 1:]
    learnt = targets != -100
    logits = model.lm_head(hidden[learnt])
    wrong = torch.zeros(len(batch.kinds)).index_add_(
        0, batch.answers[:, 1:][learnt], (logits.argmax(-1) != targets[learnt]).float()
    )
    counts: dict[str, tuple[int, int]] = {}
    for kind, mistakes in zip(batch.kinds, wrong.tolist(), strict=True):
        right, total = counts.get(kind, (0, 0))
        counts[kind] = (right + (mistakes == 0), total + 1)
    return F.cross_entropy(logits, targets[learnt]), counts


class Marks:
    """Share of answers right by kind of question, over about the last 300 answers of a kind."""

    def __init__(self) -> None:
        self.right: dict[str, float] = {}
        self.total: dict[str, float] = {}

    def add(self, counts: dict[str, tuple[int, int]]) -> None:
        for kind, (right, total) in counts.items():
            keep = max(0.0, 1 - total / 300)
            self.right[kind] = self.right.get(kind, 0.0) * keep + right
            self.total[kind] = self.total.get(kind, 0.0) * keep + total

    def accuracy(self) -> dict[str, float]:
        return {kind: round(self.right[kind] / self.total[kind], 3) for kind in sorted(self.total)}

    def mastered(self, accuracy: float) -> bool:
        """Whether every kind of question is; captions are long, and nobody can guess how a note begins."""
        asked = {kind: share for kind, share in self.accuracy().items() if kind not in ("caption", "note")}
        return bool(asked) and all(self.total[kind] >= 150 and share >= accuracy for kind, share in asked.items())

    def weights(self) -> dict[str, float]:
        """What is still answered wrongly is asked more often."""
        return {kind: 0.15 + (1 - accuracy) for kind, accuracy in self.accuracy().items()}


# Facts to look one up among, from few to all. A lesson ends when every kind of question is mastered, or at its last step.
LESSONS = (
    (Mixture(most_items=1, merged=1.0, conversation=0.1, captions=0.0, sheets=0.0, large=0.0), 0.10),
    (Mixture(most_items=2, merged=1.0, conversation=0.1, captions=0.0, sheets=0.0, large=0.0), 0.30),
    (Mixture(most_items=3, merged=1.0, conversation=0.2, captions=0.1, sheets=0.35, large=0.05), 0.50),
    (Mixture(conversation=0.4), 0.75),
    (Mixture(conversation=0.8), 1.0),  # while the learning rate falls to zero, in a line
)
MASTERED = 0.97
COOLING = 0.25  # of the steps, at the end


def start_llama(model: LlamaForCausalLM) -> None:
    """Queries start as half their keys' projection: at first a word looks for itself among what stands before it.

    Looking a fact up by a word is what the documents want. Found at random, it takes this model some thousand steps.
    """
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            keys = attention.k_proj.weight.view(-1, attention.head_dim, model.config.hidden_size)
            keys = keys.repeat_interleave(attention.num_key_value_groups, dim=0)
            attention.q_proj.weight.copy_(0.5 * keys.reshape_as(attention.q_proj.weight))


def train_llama(options: Options) -> None:
    torch.manual_seed(options.seed)
    directory = options.out / "llama-scenes"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = LlamaForCausalLM(LlamaConfig(**LLAMA, **ids))
    start_llama(model)
    body = body_of(model)
    compiled = torch.compile(body, dynamic=False) if options.compile else body
    optimizer = optimizer_for([model])
    log = Log("llama", options)
    print(f"{model.num_parameters():,} parameters")
    layout = Layout(tokenizer)

    def batch_of(prefix: str, mixture: Mixture, weights: dict[str, float] | None = None) -> LlamaBatch:
        documents = (layout(make_document(f"{prefix}/{number}", mixture, weights)) for number in count())
        return llama_batch(documents, options.batch, options.row, layout.pad)

    def hold_out(step: int) -> None:
        held = Marks()
        with torch.no_grad():
            for batch in held_out:
                held.add(llama_loss(model, body, batch)[1])
        log.write(step=step, held_out_answers_right=held.accuracy())
        save(model, directory)

    held_out = [batch_of(f"held-out/{number}", Mixture(merged=1.0, conversation=1.0)) for number in range(8)]
    lesson, marks, cool = 0, Marks(), int(COOLING * options.steps)
    end = options.steps  # comes sooner where all is mastered sooner
    for step in range(options.steps):
        if step >= end:
            break
        share = step / options.steps
        if lesson < len(LESSONS) - 1 and (share >= LESSONS[lesson][1] or marks.mastered(MASTERED)):
            log.write(step=step, lesson_ends=lesson + 1, answers_right=marks.accuracy())
            lesson, marks = lesson + 1, Marks()
            if lesson == len(LESSONS) - 1:
                end = step + cool
        loss, counts = llama_loss(
            model, compiled, batch_of(f"{options.seed}/{step}", LESSONS[lesson][0], marks.weights())
        )
        marks.add(counts)
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * min(1.0, (step + 1) / 100, (end - step) / cool)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            log.write(step=step + 1, loss=loss.item(), lesson=lesson + 1, answers_right=marks.accuracy())
        if step % options.save_every == options.save_every - 1:
            hold_out(step + 1)
    hold_out(end)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(options.threads)
    if options.part == "tokenizer":
        make_tokenizer(options.out)
    else:
        {"siglip": train_siglip, "llama": train_llama}[options.part](options)


if __name__ == "__main__":
    main()

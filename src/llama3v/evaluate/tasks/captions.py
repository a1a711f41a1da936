"""Captions against several references an image: CIDEr first, then BLEU, ROUGE-L and METEOR.

CIDEr, BLEU and ROUGE-L are computed by pycocoevalcap, the COCO evaluation itself. Its tokenizer and METEOR are Java programs,
which few machines have; here nltk stands in for both, so that
- captions are split by nltk's Treebank tokenizer instead of Stanford's, which splits nearly all captions alike;
- METEOR is nltk's, with exact and stemmed matches only: it is not METEOR 1.5 and is named so.

CIDEr weighs words by how rare they are in the references *of the images at hand*: it compares only on the same images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llama3v.data.sources.base import ImageRef, Sample, open_source
from llama3v.errors import ConfigError, DataError
from llama3v.evaluate.records import AnswerRecord, Parsed
from llama3v.evaluate.tasks.base import Figure, Task, TaskSample, mean_score
from llama3v.evaluate.tasks.rows import Row, find_files, read_rows

PROMPT = "Provide a one-sentence caption for the provided image."  # as in lmms-eval 0.7.3, tasks/coco_cap
_CONVERSATIONS = ("conversations", "texts", "messages")
_REFERENCES = ("answer", "caption", "captions", "sentences")
_PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
"""What the COCO evaluation leaves out after splitting (pycocoevalcap/tokenizer/ptbtokenizer.py); and brackets, below,
which Stanford's tokenizer writes as -LRB- and nltk's as they are."""
_BRACKETS = frozenset("()[]{}")


def split_words(caption: str) -> str:
    """Lower-case words with single spaces between, without punctuation."""
    from nltk.tokenize import NLTKWordTokenizer

    words = NLTKWordTokenizer().tokenize(" ".join(caption.lower().split()))
    return " ".join(word for word in words if word not in _PUNCTUATION and word not in _BRACKETS)


@dataclass(frozen=True)
class CaptionScores:
    """Of captions in their order: CIDEr of each, and figures of all together."""

    cider: list[float]
    corpus: dict[str, float]


def score_captions(captions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """CIDEr (1.0 is what papers print as 100), BLEU-1 to 4, ROUGE-L and METEOR without synonyms."""
    library = _import_library()
    said = {number: [split_words(caption)] for number, caption in enumerate(captions)}
    gold = {number: [split_words(one) for one in several] for number, several in enumerate(references)}
    cider, each = library["Cider"]().compute_score(gold, said)
    bleu, _ = library["Bleu"](4).compute_score(gold, said, verbose=0)
    rouge, _ = library["Rouge"]().compute_score(gold, said)
    meteor = [
        library["meteor_score"]([one.split() for one in gold[number]], said[number][0].split(), wordnet=_NoSynonyms())
        for number in said
    ]
    corpus = {f"BLEU-{n}": float(value) for n, value in enumerate(bleu, 1)}
    corpus |= {"ROUGE-L": float(rouge), "METEOR (exact and stem)": sum(meteor) / len(meteor), "CIDEr": float(cider)}
    return CaptionScores([float(value) for value in each], corpus)


class Captions(Task):
    name = "captions"
    rule = "CIDEr by pycocoevalcap, captions split by nltk; weights from these images' references"
    files = ("test-*.parquet", "data/test-*.parquet", "validation-*.parquet", "*.parquet", "dev.json", "*.json")
    max_new_tokens = 48

    def _samples(self) -> Iterator[TaskSample]:
        for path in find_files(str(self.where), self.files):
            first = next(read_rows(path), None)
            if first is None:
                continue
            if any(column in first.values for column in _CONVERSATIONS):
                yield from _grouped(str(path))
            else:
                yield from (self.sample(row) for row in read_rows(path))

    def sample(self, row: Row) -> TaskSample:
        references = row.texts(*_REFERENCES)
        if not references:
            raise DataError(f"{row.name}: has no captions")
        id = str(row.get("question_id") or row.get("filename") or row.name)
        return TaskSample(id, row.images("image"), PROMPT, references)

    def parse(self, answer: str, sample: TaskSample) -> Parsed | None:
        return answer.strip() or None

    def score(self, parsed: Parsed, sample: TaskSample) -> float:
        """ROUGE-L, which needs no other image; `settle` puts CIDEr in its place."""
        if not isinstance(parsed, str):
            return 0.0
        scorer = _import_library()["Rouge"]()
        return float(scorer.calc_score([split_words(parsed)], [split_words(one) for one in sample.references]))

    def figures(self) -> tuple[Figure, ...]:
        return (mean_score("CIDEr", most=10.0),)

    def settle(self, records: Sequence[AnswerRecord]) -> list[AnswerRecord]:
        scores = score_captions([record.answer for record in records], [record.references for record in records])
        return [replace(record, score=score) for record, score in zip(records, scores.cider, strict=True)]

    def corpus_figures(self, records: Sequence[AnswerRecord]) -> dict[str, float]:
        scores = score_captions([record.answer for record in records], [record.references for record in records])
        return {name: value for name, value in scores.corpus.items() if name != "CIDEr"}


def _grouped(spec: str) -> Iterator[TaskSample]:
    """One sample an image, in order of appearance; each row about it gives a reference."""
    images: dict[str, ImageRef] = {}
    prompts: dict[str, str] = {}
    references: dict[str, list[str]] = {}
    for row in open_source(spec):
        if not isinstance(row, Sample):
            raise DataError(f"{spec}: row {row.id} cannot be used: {row.reason}")
        said = [turn.text for turn in row.turns if turn.role == "assistant"]
        asked = [turn.text for turn in row.turns if turn.role == "user"]
        for image in row.images:
            images.setdefault(image.name, image)
            prompts.setdefault(image.name, asked[0] or PROMPT)
            references.setdefault(image.name, []).append(said[0])
    for name, image in images.items():
        yield TaskSample(name, (image,), prompts[name], tuple(references[name]))


class _NoSynonyms:
    """In the place of WordNet, whose data is a download of its own."""

    def synsets(self, word: str) -> list[Any]:
        return []


def _import_library() -> dict[str, Any]:
    try:
        from nltk.translate.meteor_score import meteor_score
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise ConfigError(f"scoring captions needs an extra ({error.name}): pip install 'llama3v[captions]'") from error
    return {"Bleu": Bleu, "Cider": Cider, "Rouge": Rouge, "meteor_score": meteor_score}

"""The answer normalisation of the VQA benchmarks, and the accuracy against ten annotators.

Rule: the VQA evaluation (GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py) and its EvalAI variant, which
TextVQA scores by (facebookresearch/mmf), as both stand in lmms-eval 0.7.3 (tasks/_task_utils/vqa_eval_metric.py). Its
oddities are kept, or scores would not compare; tests/golden/metric_vectors.json holds what the original returns.
"""

import re
from collections.abc import Sequence

NUMBERS = dict(
    zip(
        ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
        map(str, [0, *range(11)]),
        strict=True,
    )
)
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_FULL_STOP = re.compile(
    r"\.(?!\d)"
)  # the rule's pattern also looks behind, but by a slip for the text "<=" and a digit
_FULL_STOPS = 32  # it passes a flag (re.UNICODE, 32) where the count of replacements stands: the first 32 go

_WITHOUT_APOSTROPHE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
I'm I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't
should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's
there'd there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's
what've when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't
y'all you'd you'll you're you've
"""
_MISPLACED = """
couldn'tve=couldn't've couldnt've=couldn't've hadnt've=hadn't've hadn'tve=hadn't've hed've=he'd've
he'dve=he'd've Id've=I'd've I'dve=I'd've itd've=it'd've it'dve=it'd've mightnt've=mightn't've
mightn'tve=mightn't've ow's'at='ow's'at 'ows'at='ow's'at 'ow'sat='ow's'at shed've=she'd've she'dve=she'd've
shouldnt've=shouldn't've shouldn'tve=shouldn't've somebody'd=somebodyd somebodyd've=somebody'd've
somebody'dve=somebody'd've someoned've=someone'd've someone'dve=someone'd've somethingd've=something'd've
something'dve=something'd've thered've=there'd've there'dve=there'd've theyd've=they'd've they'dve=they'd've
wed've=we'd've we'dve=we'd've whod've=who'd've who'dve=who'd've wouldnt've=wouldn't've wouldn'tve=wouldn't've
yall'll=y'all'll y'allll=y'all'll yall'd've=y'all'd've y'alld've=y'all'd've y'all'dve=y'all'd've
youd've=you'd've you'dve=you'd've
"""
CONTRACTIONS = {word.replace("'", ""): word for word in _WITHOUT_APOSTROPHE.split()}
CONTRACTIONS |= dict(pair.split("=") for pair in _MISPLACED.split())


def normalise_evalai(text: str) -> str:
    """The EvalAI variant, for TextVQA: lower case, no commas, question marks, articles or punctuation, digits for number
    words, apostrophes in contractions.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise_vqa(text)


def normalise_vqa(text: str) -> str:
    """The VQA evaluation's own."""
    text = _without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _without_punctuation(text: str) -> str:
    """A mark goes where it stands beside a space anywhere in the text, or where the text has a number with a comma; else
    it becomes a space.
    """
    result = text
    drops_all = _COMMA_IN_NUMBER.search(text) is not None
    for mark in PUNCTUATION:
        dropped = drops_all or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if dropped else " ")
    return _FULL_STOP.sub("", result, count=_FULL_STOPS)


def annotator_accuracy(answer: str, references: Sequence[str]) -> float:
    """Answers that are normalised already: the mean, over leaving out one annotator, of min(1, agreeing others / 3)."""
    agreeing = [answer == reference for reference in references]
    shares = [min(1.0, (sum(agreeing) - own) / 3) for own in agreeing]
    return sum(shares) / len(shares)

"""Which text each image of a sample is judged with, where the question is whether both belong together."""

from llama3v.data.sources.base import Sample


def texts_of(sample: Sample) -> tuple[str, ...]:
    """For each image of a sample, the text of its pair; empty where there is none.

    It is the answer to the turn that owns the image: of a caption data set the caption, of a conversation the first thing
    that is said about the image. Questions are left out, since they fit many images, and so are later answers, since
    they often make sense only with what was said before.
    """
    texts = [""] * len(sample.images)
    for number, turn in enumerate(sample.turns):
        if turn.images:
            answers = (later.text.strip() for later in sample.turns[number + 1 :] if later.role == "assistant")
            answer = next(answers, "")
            for image in turn.images:
                texts[image] = answer
    return tuple(texts)

"""eval.html: how well it sees and how sure that is, beside what others claim, with right and wrong answers to look at."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama3v.data.sources.base import ImageRef
from llama3v.evaluate.contamination import NEAR, Match, Trained, picture_of
from llama3v.evaluate.published import our_row, published
from llama3v.evaluate.records import AnswerRecord
from llama3v.evaluate.sight import CONDITIONS, OVERVIEW
from llama3v.evaluate.specs import LoadedTask
from llama3v.evaluate.table import CONTROLS, headline, interval, notes, p_value, plain, score
from llama3v.model.tiles import decode_image
from llama3v.report import GalleryItem, Report

RIGHT_SHOWN, WRONG_SHOWN, PAIRS_SHOWN = 6, 9, 12  # three in a row
LONGEST = 300  # characters of a prompt in the gallery
GOOD = 0.5  # partial credit (ANLS, CIDEr) from which an answer is shown among the right ones


def write_report(
    path: Path,
    summary: dict[str, Any],
    tasks: Sequence[LoadedTask],
    settled: dict[str, list[AnswerRecord]],
    trained: Trained | None,
    matches: dict[str, list[Match]],
) -> Path:
    """The report of a run.

    Args:
        settled: label -> the scored records of all conditions.
        trained: what is known of the training's pictures. matches: label -> those of the task's that are among them.
    """
    name = Path(str(summary["model"])).name or str(summary["model"])
    report = Report(f"What {name} sees", _subtitle(summary))
    report.add_figures(
        [
            (row["label"], plain(headline(row, "right image")), _controls_in_words(row) or row["figure"])
            for row in summary["tasks"]
        ]
    )
    report.add_text("How to read this", _reading(summary))
    _add_scores(report, summary)
    _add_beside_published(report, summary, name)
    _add_categories(report, summary)
    _add_slicing(report, summary)
    if trained is not None:
        _add_contamination(report, summary, tasks, trained, matches)
    for one in tasks:
        _add_gallery(report, one, settled[one.spec.label])
    _add_what_was_asked(report, summary)
    return report.write(path)


def _subtitle(summary: dict[str, Any]) -> str:
    where = f"at {summary['url']}" if "url" in summary else f"on the engine {summary['engine']}"
    samples = sum(row["samples"] for row in summary["tasks"])
    labels = ", ".join(row["label"] for row in summary["tasks"])
    return f"{summary['model']} {where}: {samples:,} samples of {labels}"


def _controls_in_words(row: dict[str, Any]) -> str:
    values = headline(row, "right image")
    bounds = "no answer counts" if values is None else f"95 %: {values['low']:.3f} to {values['high']:.3f}"
    parts = [f"{row['figure']}; {bounds}"]
    parts += [f"{name} {value}" for name in CONTROLS if (value := score(row, name)) is not None]
    return "; ".join(parts)


def _reading(summary: dict[str, Any]) -> list[str]:
    said = [
        "Every score has its 95 % interval (bootstrap over pictures). A model that scores as well with another sample's "
        "picture, or with none, has learnt the questions and not to look: only the difference is sight. Unparsed is the "
        "share of answers that the benchmark's own rule could not read."
    ]
    return [*said, *notes(summary)]


def _add_scores(report: Report, summary: dict[str, Any]) -> None:
    rows = []
    for row in summary["tasks"]:
        for name in dict.fromkeys([row["figure"], *row["conditions"]["right image"]["figures"]]):
            under = {condition: values["figures"].get(name) for condition, values in row["conditions"].items()}
            first = name == row["figure"]
            seen = row["differences"].get("wrong image") if first else None
            rows.append(
                [
                    _unbroken(row["label"]) if first else "",
                    name,
                    _unbroken(interval(under["right image"])),
                    *(plain(under[condition]) if condition in under else None for condition in CONTROLS),
                    _unbroken(p_value(seen["p_value"])) if seen else "",
                    f"{row['conditions']['right image']['unparsed']:.1%}" if first else "",
                    row["samples"] if first else "",
                ]
            )
        for name, value in row["conditions"]["right image"]["corpus"].items():
            controls = [row["conditions"].get(condition, {}).get("corpus", {}).get(name) for condition in CONTROLS]
            rows.append(
                ["", name, f"{value:.3f}", *(None if one is None else f"{one:.3f}" for one in controls), "", "", ""]
            )
    columns = ["task", "figure", "right image [95 %]", "wrong image", "blind", "p", "unparsed", "samples"]
    report.add_table("Scores", columns, rows, "p: of the difference between right and wrong images, paired.")


def _add_beside_published(report: Report, summary: dict[str, Any], name: str) -> None:
    table, ours = published(), our_row(summary)
    part = " (first samples only)" if summary["limit"] is not None and ours else ""
    rows = [[f"{name}, measured here{part}", *(_cell(ours.get(one.task)) for one in table.benchmarks)]]
    for claim in table.claims:
        cells = [_cell(claim.scores.get(one.task)) + "*" * (one.task in claim.unchecked) for one in table.benchmarks]
        rows.append([_unbroken(claim.model), *cells])
    said = " ".join([*_apart_from_theirs(summary, ours), table.note])
    said += " " + "; ".join(f"{one.model}: {one.source}" for one in table.claims) + "."
    report.add_table("Beside published claims", ["model", *(one.name for one in table.benchmarks)], rows, said)


def _apart_from_theirs(summary: dict[str, Any], ours: dict[str, float]) -> list[str]:
    """Why our row is not quite like the others."""
    if not ours:
        return ["This run asked none of these benchmarks."]
    splits = ", ".join(f"{one.name} {one.split}" for one in published().benchmarks if one.task in ours)
    said = [f"Our row is of the splits {splits}, where --tasks names no other."]
    if "mathvista" in ours:
        said.append("Our MathVista is quick extraction, which does not compare with theirs.")
    judge = next((row.get("judge") for row in summary["tasks"] if row["task"] == "mmbench"), None)
    if "mmbench" in ours and judge is None:
        said.append(
            "Our MMB has no judge: an answer that matches no option counts as wrong, where the published protocol asks ChatGPT "
            "which is meant (--judge-url)."
        )
    elif "mmbench" in ours:
        said.append(
            f"Our MMB: answers that match no option were read by {judge}, in the published protocol by ChatGPT."
        )
    return said


def _unbroken(text: str) -> str:
    """Text that a narrow column does not break."""
    return text.replace(" ", "\N{NO-BREAK SPACE}").replace("-", "\N{NON-BREAKING HYPHEN}")


def _cell(value: float | str | None) -> str:
    return "–" if value is None else _unbroken(value) if isinstance(value, str) else f"{value:.1f}"


def _add_categories(report: Report, summary: dict[str, Any]) -> None:
    for row in summary["tasks"]:
        asked = [name for name in CONDITIONS if name in row["conditions"]]
        names = row["conditions"]["right image"]["categories"]
        if len(names) < 2:
            continue
        groups = {
            name: {
                condition: max(0.0, row["conditions"][condition]["categories"][name]["value"])
                for condition in asked
                if name in row["conditions"][condition]["categories"]
            }
            for name in names
        }
        bounds = "; ".join(f"{name} {values['low']:.2f} to {values['high']:.2f}" for name, values in names.items())
        report.add_bars(f"{row['label']} by category", groups, f"{row['figure']}. 95 % intervals: {bounds}.")


def _add_slicing(report: Report, summary: dict[str, Any]) -> None:
    rows = []
    for row in summary["tasks"]:
        change = row["differences"].get(OVERVIEW)
        if change is not None:
            scores = [_unbroken(interval(headline(row, condition))) for condition in ("right image", OVERVIEW)]
            better = f"{change['first_better']} : {change['second_better']}"
            rows.append(
                [
                    row["label"],
                    *scores,
                    _unbroken(interval(change["difference"], sign=True)),
                    p_value(change["p_value"]),
                    better,
                ]
            )
    if rows:
        columns = ["task", "with slices", "overview only", "difference", "p", "better : worse"]
        report.add_table("What slicing changed", columns, rows, "The same samples, paired; 95 % intervals.")


def _add_contamination(
    report: Report,
    summary: dict[str, Any],
    tasks: Sequence[LoadedTask],
    trained: Trained,
    matches: dict[str, list[Match]],
) -> None:
    rows = []
    for row in summary["tasks"]:
        known = row["contamination"]
        clean = (
            "–"
            if known["clean"] is None
            else f"{_unbroken(interval(known['clean']))}, {known['clean_samples']:,} samples"
        )
        score = _unbroken(interval(headline(row, "right image")))
        rows.append(
            [_unbroken(row["label"]), known["images"], known["same_file"], known["near_duplicates"], score, clean]
        )
    note = f"Compared with {len(trained.keys):,} pictures of the training by their files' hash"
    note += (
        f", and with {len(trained.names):,} by perceptual hash ({NEAR} of 64 bits)."
        if trained.names
        else ("; near-duplicates were not looked for (--trained-data).")
    )
    columns = ["task", "pictures", "same file", "near-duplicates", "score", "without them"]
    report.add_table("Were its pictures trained on?", columns, rows, note)
    for one in tasks:
        pairs = [(match, own) for match in matches[one.spec.label] for own in one.keys if own.name == match.image]
        items = [_pair(trained, match, own) for match, own in pairs if match.trained][:PAIRS_SHOWN]
        if items:
            report.add_gallery(f"{one.spec.label}: pictures the training had", items, "Left: the task's.")


def _pair(trained: Trained, match: Match, own: ImageRef) -> GalleryItem:
    from PIL import Image, ImageOps

    other = picture_of(trained, match)
    files = [own.read(), *([other] if other is not None else [])]
    side_by_side = Image.new("RGB", (320 * len(files), 240), "white")
    for place, file in enumerate(files):
        side_by_side.paste(ImageOps.pad(decode_image(file), (320, 240), color="white"), (320 * place, 0))
    kind = "same file" if match.same_file else f"{match.bits} bits apart"
    return GalleryItem(
        side_by_side, [("task", match.image, None), ("training", match.trained, None), ("they are", kind, None)]
    )


def _add_gallery(report: Report, one: LoadedTask, records: Sequence[AnswerRecord]) -> None:
    """Right and wrong answers, one of each category in turn, each picture once, spread over the samples."""
    images = {sample.id: sample.images for sample in one.samples}
    said: dict[str, dict[str, AnswerRecord]] = {}
    for record in records:
        said.setdefault(record.id, {})[record.condition] = record
    right = [record for record in records if record.condition == "right image" and images.get(record.id)]
    for title, some, most in (
        ("answered right", [record for record in right if record.score >= GOOD], RIGHT_SHOWN),
        ("answered wrong", [record for record in right if record.score < GOOD], WRONG_SHOWN),
    ):
        items = [_item(record, images[record.id], said[record.id]) for record in _spread(some, most)]
        if items:
            report.add_gallery(f"{one.spec.label}: {title}", items, f"{len(items)} of the {len(some):,} that were.")


def _spread(records: Sequence[AnswerRecord], most: int) -> list[AnswerRecord]:
    waiting: dict[str, list[AnswerRecord]] = {}
    for record in records:
        waiting.setdefault(record.category, []).append(record)
    chosen: list[AnswerRecord] = []
    pictures: set[tuple[str, ...]] = set()
    while len(chosen) < most and any(waiting.values()):
        for some in waiting.values():
            if not some or len(chosen) == most:
                continue
            record = some.pop(len(some) // 2)
            if record.images not in pictures:
                pictures.add(record.images)
                chosen.append(record)
    return chosen


def _item(record: AnswerRecord, images: Sequence[ImageRef], said: dict[str, AnswerRecord]) -> GalleryItem:
    lines: list[tuple[str, str, bool | None]] = [("question", _short(record.prompt), None)]
    lines.append(("expected", _short(" / ".join(dict.fromkeys(record.references))), None))
    for condition in (*CONDITIONS, OVERVIEW):
        if condition in said:
            is_own = condition == "right image"
            verdict = record.score >= GOOD if is_own else None
            score = f" ({record.score:.2f})" if is_own and record.score not in (0.0, 1.0) else ""
            lines.append((condition, (_short(said[condition].answer) or "(nothing)") + score, verdict))
    return GalleryItem(images[0].read(), lines)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _add_what_was_asked(report: Report, summary: dict[str, Any]) -> None:
    for row in summary["tasks"]:
        lines = [
            f"data      {row['data'] or '(drawn from a seed)'}",
            f"digest    {row['data_digest']}",
            f"rule      {row['rule']}",
            f"length    at most {row['max_new_tokens']} new tokens, greedy",
            "first prompt:",
            *(f"    {line}" for line in row["prompt"].splitlines()),
        ]
        report.add_code(f"{row['label']}: what was asked", "\n".join(lines))
    versions = [[name, value] for name, value in {"llama3v": summary["version"], **summary["environment"]}.items()]
    versions += [[name, str(summary[name])] for name in ("engine", "weights", "detail", "limit") if summary.get(name)]
    report.add_table("Versions", ["part", "version"], versions)

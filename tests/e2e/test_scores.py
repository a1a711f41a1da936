"""Pair scores with the SigLIP that the package carries: made, kept, reported, and used by training."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from llama3v import cli
from llama3v.config import CacheConfig, EncodeConfig, PretrainConfig, SftConfig
from llama3v.data.pairs import texts_of
from llama3v.data.sources import open_source
from llama3v.data.synthetic.language import caption
from llama3v.data.synthetic.scenes import draw, make_scene
from llama3v.errors import CacheError, CheckpointError, ConfigError
from llama3v.feature_cache import journal, scores_pass
from llama3v.feature_cache.encode import encode
from llama3v.feature_cache.layout import CachePaths
from llama3v.feature_cache.reader import CacheReader
from llama3v.feature_cache.scores import Scores, open_scores
from llama3v.feature_cache.tools import cache
from llama3v.model.llama3v import build_model, save_model
from llama3v.model.pair_score import PairScorer
from llama3v.model.tiles import decode_image, image_key
from llama3v.recipes.quickstart import SCENE_LLM, SCENE_TOWER
from llama3v.train import run

SCENES = 8
LONG = " ".join(["There is a large red circle to the left of a small blue square."] * 9)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_data(directory: Path, texts: list[str], name: str) -> Path:
    """The scenes with a text each, one text-only row, and one scene a second time with the same text."""
    rows = [{"id": f"{name}-{number}", "image": f"{number}.png", "text": text} for number, text in enumerate(texts)]
    rows += [{"id": "without an image", "text": "Four."}, rows[0] | {"id": "again"}]
    for row in rows:
        question = ("<image>\n" if "image" in row else "") + "What is there?"
        row["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": row.pop("text")}]
    path = directory / f"{name}.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """right.json: each scene with its caption; shuffled.json: with the next one's; long.json: one text too long."""
    directory = tmp_path_factory.mktemp("scenes")
    drawn = [make_scene(f"scores/{number}") for number in range(SCENES)]
    for number, scene in enumerate(drawn):
        draw(scene, 3 if number == 1 else 1).save(directory / f"{number}.png")  # one is large enough to be cut
    captions = [caption(scene) for scene in drawn]
    return {
        "right": write_data(directory, captions, "right"),
        "shuffled": write_data(directory, [*captions[1:], captions[0]], "shuffled"),
        "long": write_data(directory, [LONG, *captions[1:]], "long"),
    }


def options(data: Path, root: Path, **more: object) -> EncodeConfig:
    chosen = {"data": str(data), "vision": str(SCENE_TOWER), "cache": root, "score": True, **more}
    return EncodeConfig(**chosen)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, scenes: dict[str, Path]) -> tuple[CachePaths, dict, dict]:
    """A cache whose right and shuffled pairs are scored, with both summaries."""
    root = tmp_path_factory.mktemp("scored")
    right, shuffled = encode(options(scenes["right"], root)), encode(options(scenes["shuffled"], root))
    return CachePaths(root, right["fingerprint"]), right, shuffled


def without_scores(paths: CachePaths, root: Path) -> CachePaths:
    """A copy of a cache, as if it had been filled without --score."""
    copied = CachePaths(shutil.copytree(paths.root, root), paths.fingerprint)
    shutil.rmtree(copied.scores)
    return copied


def scores_of(paths: CachePaths, data: Path) -> dict[str, float]:
    """Sample id -> score, of samples with an image."""
    scores = open_scores(paths)
    assert scores is not None
    found = {}
    for sample in open_source(str(data)):
        for image, text in zip(sample.images, texts_of(sample), strict=True):
            score = scores.find(image_key(image.read()), text)
            assert score is not None, sample.id
            found[sample.id] = score.value
    return found


def test_captions_of_other_scenes_score_lower_and_are_scored_without_encoding_anything(scored, scenes) -> None:
    paths, first, second = scored
    assert (first["encoded"], first["pairs"], first["scored"]) == (SCENES, SCENES + 1, SCENES)
    assert (second["encoded"], second["pairs"], second["scored"]) == (0, SCENES + 1, SCENES)
    right, shuffled = (list(scores_of(paths, scenes[name]).values()) for name in ("right", "shuffled"))
    assert sum(right) / len(right) > 0.5 > 3 * sum(shuffled) / len(shuffled)
    assert sum(a > b for a, b in zip(right, shuffled, strict=True)) >= SCENES


def test_scores_are_those_of_the_whole_model_up_to_the_rounding_of_the_cache(scored, scenes) -> None:
    scorer = PairScorer.from_pretrained(SCENE_TOWER)
    samples = [sample for sample in open_source(str(scenes["right"])) if sample.images]
    expected = {
        sample.id: float(scorer.score([decode_image(sample.images[0].read())], texts_of(sample))) for sample in samples
    }
    found = scores_of(scored[0], scenes["right"])
    for sample, probability in expected.items():
        assert torch.logit(torch.tensor(found[sample])) == pytest.approx(
            torch.logit(torch.tensor(probability)).item(), abs=0.02
        )


def test_a_second_run_scores_nothing_and_changes_nothing(scored, scenes) -> None:
    paths = scored[0]
    before = {path: path.read_bytes() for path in paths.scores.rglob("*") if path.is_file()}
    summary = encode(options(scenes["right"], paths.root))
    assert (summary["pairs"], summary["scored"], summary["encoded"]) == (SCENES + 1, 0, 0)
    assert {path: path.read_bytes() for path in paths.scores.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("more", [{"codec": "int8", "cut": 2}, {"mode": "pixels"}])
def test_a_cache_that_was_filled_before_is_scored_from_its_records_to_the_same_scores(
    tmp_path: Path, scored, scenes, more: dict
) -> None:
    """Whatever it holds: features at any cut, in any codec, or tiles."""
    summary = encode(options(scenes["right"], tmp_path / "at once", **more))
    at_once = CachePaths(tmp_path / "at once", summary["fingerprint"])
    later = without_scores(at_once, tmp_path / "later")
    shards = {path: path.stat().st_mtime_ns for path in later.shards.iterdir()}
    summary = encode(options(scenes["right"], later.root, **more))
    assert (summary["encoded"], summary["scored"]) == (0, SCENES)
    assert {path: path.stat().st_mtime_ns for path in later.shards.iterdir()} == shards
    found = scores_of(later, scenes["right"])
    assert found == pytest.approx(scores_of(at_once, scenes["right"]), rel=1e-5)
    assert found == pytest.approx(scores_of(scored[0], scenes["right"]), abs=0.01)


def test_a_text_that_is_too_long_is_scored_in_pieces_and_counted(scored, scenes) -> None:
    paths = scored[0]
    summary = encode(options(scenes["long"], paths.root))
    assert (summary["scored"], summary["scored_in_pieces"]) == (1, 1)
    scores = open_scores(paths)
    assert scores is not None
    found = scores.find(image_key((scenes["long"].parent / "0.png").read_bytes()), LONG)
    assert found is not None
    scorer = PairScorer.from_pretrained(SCENE_TOWER)
    assert found.pieces == len(scorer.pieces(LONG)) > 1
    image = decode_image((scenes["long"].parent / "0.png").read_bytes())
    assert found.value == pytest.approx(float(scorer.score([image], scorer.pieces(LONG)).mean()), abs=1e-3)


def test_a_damaged_record_is_no_reason_to_lose_the_scores_of_others(tmp_path: Path, scored, scenes) -> None:
    root = without_scores(scored[0], tmp_path / "cache").root
    reader = CacheReader(root)
    record = next(iter(reader.records()))
    path = reader.paths.shard(record.shard)
    data = bytearray(path.read_bytes())
    data[record.offset + 11] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheError, match=rf"1 images could not be scored, the first is {record.key}.*run the same"):
        encode(options(scenes["right"], root))
    again = encode(options(scenes["right"], root))
    assert (again["encoded"], again["scored"]) == (1, 1)


def test_an_image_that_is_met_again_before_it_is_committed_is_scored_with_every_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings of recent images are kept; where they are gone, it waits for the commit."""
    monkeypatch.setattr(scores_pass, "EMBEDDINGS_KEPT", 1)
    scene = make_scene("scores/again")
    for name in "ab":
        draw(make_scene(f"scores/{name}") if name == "b" else scene).save(tmp_path / f"{name}.png")
    names = ["a", "b", "a", "b", "a"]
    lines = [{"file_name": f"{name}.png", "text": f"text {number}"} for number, name in enumerate(names)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    summary = encode(options(tmp_path, tmp_path / "cache", batch_tiles=1))
    assert (summary["encoded"], summary["pairs"], summary["scored"]) == (2, 5, 5)


def test_prune_drops_the_scores_of_dropped_images_and_info_counts_what_stays(tmp_path: Path, scored, scenes) -> None:
    paths = CachePaths(shutil.copytree(scored[0].root, tmp_path / "cache"), scored[0].fingerprint)
    rows = json.loads(scenes["right"].read_text())
    some = scenes["right"].with_name("some.json")
    some.write_text(json.dumps(rows[:4]))
    encode(options(some, paths.root))
    (before,) = cache(CacheConfig("info", paths.root))[paths.fingerprint]["pair scores"].values()
    result = cache(CacheConfig("prune", paths.root, keep=(str(some),), yes=True))[paths.fingerprint]
    (after,) = cache(CacheConfig("info", paths.root))[paths.fingerprint]["pair scores"].values()
    assert result["pair scores that stay"] == after["pairs"] < before["pairs"]
    assert result["pair scores that go"] == before["pairs"] - after["pairs"]
    assert after["text_tokens"] == "64"
    assert len(scores_of(paths, some)) == 4
    scores = open_scores(paths)
    assert scores is not None
    gone = image_key((some.parent / "7.png").read_bytes())
    assert scores.find(gone, caption(make_scene("scores/7"))) is None


def test_a_vision_half_alone_cannot_score_and_says_so_before_anything_is_encoded(
    tmp_path: Path, scenes, tiny_vision_dir: Path, tiny_model_dir: Path
) -> None:
    for vision in (tiny_vision_dir, tiny_model_dir):
        with pytest.raises(CheckpointError, match=r"--score: .*text half.* leave --score away"):
            encode(options(scenes["right"], tmp_path / "cache", vision=str(vision)))
    assert not (tmp_path / "cache").exists()


# Training


@pytest.fixture
def pretrain(scored, scenes, tmp_path: Path) -> PretrainConfig:
    return PretrainConfig(
        data=(str(scenes["shuffled"]), str(scenes["right"])),
        vision=str(SCENE_TOWER),
        llm=str(SCENE_LLM),
        cache=scored[0].root,
        out=tmp_path / "run",
        row_tokens=256,
        rows_per_step=2,
        steps=1,
    )


def quiet() -> Console:
    return Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: PTH123


def test_training_leaves_out_what_scores_too_low_and_the_ledger_says_why(
    pretrain: PretrainConfig, scored, scenes
) -> None:
    low = {
        name: score
        for data in ("shuffled", "right")
        for name, score in scores_of(scored[0], scenes[data]).items()
        if score < 0.2 and name != "again"
    }
    assert len(low) >= SCENES - 2
    summary = run.pretrain(replace(pretrain, min_score=0.2), console=quiet())
    entries = [json.loads(line) for line in (pretrain.out / "ledger.jsonl").read_text().splitlines()]
    left_out = {entry["id"]: entry for entry in entries if entry["id"] != "again"}
    assert set(left_out) == set(low)
    for name, score in low.items():
        assert left_out[name]["reason"] == "pair score below --min-score"
        assert left_out[name]["score"] == pytest.approx(score)
        assert left_out[name]["text"]
    assert summary["below_min_score"] == summary["left_out"] == len(entries)
    assert summary["samples"] == 2 * (SCENES + 2) - len(entries)  # text-only samples stay
    assert summary["options"]["min_score"] == 0.2
    with pytest.raises(CheckpointError, match=r"min_score was 0\.2, now 0\.1"):
        run.pretrain(replace(pretrain, min_score=0.1), console=quiet())


def test_a_sample_without_a_score_stops_training_and_the_command_it_names_mends_that(
    pretrain: PretrainConfig, scenes, tmp_path: Path
) -> None:
    shutil.copytree(pretrain.cache, tmp_path / "cache")  # type: ignore[arg-type]
    other = scenes["right"].with_name("other.json")
    other.write_text(scenes["right"].read_text().replace(caption(make_scene("scores/3")), "A heap of sand."))
    config = replace(pretrain, data=(str(other),), cache=tmp_path / "cache", min_score=0.2)
    with pytest.raises(CacheError, match=r"right-3 of .*other\.json has none.*run: llama3v encode .*--score") as caught:
        run.pretrain(config, console=quiet())
    command = str(caught.value).partition("run: llama3v ")[2].split()
    assert cli.main(command) == 0
    paths = CachePaths(tmp_path / "cache", next(iter((tmp_path / "cache").iterdir())).name)
    assert scores_of(paths, other)["right-3"] < 0.2


def test_a_cache_without_scores_names_the_command_in_both_stages(
    pretrain: PretrainConfig, scored, tmp_path: Path
) -> None:
    config = replace(pretrain, cache=without_scores(scored[0], tmp_path / "cache").root, min_score=0.2)
    with pytest.raises(CacheError, match=rf"has none; run: llama3v encode --data .* --vision {SCENE_TOWER}.* --score"):
        run.pretrain(config, console=quiet())
    save_model(*build_model(str(SCENE_TOWER), str(SCENE_LLM)), tmp_path / "model")
    stage2 = SftConfig(
        data=config.data, model=str(tmp_path / "model"), cache=config.cache, out=tmp_path / "sft", min_score=0.2
    )
    with pytest.raises(
        CacheError, match=r"--vision SIGLIP .*--cut 4 --score \(SIGLIP: the checkpoint with both halves"
    ):
        run.sft(stage2, console=quiet())


def test_a_threshold_without_a_cache_is_refused(pretrain: PretrainConfig) -> None:
    with pytest.raises(ConfigError, match="--min-score needs the scores of a cache"):
        replace(pretrain, mode="stream", min_score=0.2)
    with pytest.raises(ConfigError, match="give a probability"):
        replace(pretrain, min_score=2.0)


# The report


def test_the_report_shows_the_worst_pairs_with_pictures_and_what_a_threshold_drops(
    tmp_path: Path, scored, scenes
) -> None:
    paths = scored[0]
    data = (str(scenes["right"]), str(scenes["shuffled"]))
    config = CacheConfig("scores", paths.root, data=data, out=tmp_path, min_score=0.2, worst=5)
    found = cache(config)[paths.fingerprint]
    values = sorted(score for name in ("right", "shuffled") for score in scores_of(paths, scenes[name]).values())
    assert (found["samples"], found["samples without a score"]) == (2 * (SCENES + 1), 0)
    assert found["samples without an image or an answer"] == 2
    html = (tmp_path / "scores.html").read_text()
    below = found["samples that --min-score would leave out"]
    assert below["0.2"] == sum(row["score"] < 0.2 for row in _all_scores(paths, scenes)) >= SCENES - 2
    assert f"{values[0]:.4g}" in html
    assert html.count("<figure>") >= 5 + 2
    worst = min(_all_scores(paths, scenes), key=lambda row: row["score"])
    assert worst["text"] in html
    assert json.loads((tmp_path / "scores.json").read_text())["fingerprints"][paths.fingerprint] == found


def _all_scores(paths: CachePaths, scenes: dict[str, Path]) -> list[dict]:
    scores, found = open_scores(paths), []
    assert isinstance(scores, Scores)
    for name in ("right", "shuffled"):
        for sample in open_source(str(scenes[name])):
            if sample.images:
                text = texts_of(sample)[0]
                score = scores.find(image_key(sample.images[0].read()), text)
                assert score is not None
                found.append({"text": text, "score": score.value})
    return found


def test_the_report_needs_scores_and_tells_of_missing_ones_and_pictures(tmp_path: Path, scored, scenes) -> None:
    paths = scored[0]
    numbers = cache(CacheConfig("scores", paths.root, out=tmp_path / "all"))[paths.fingerprint]
    assert numbers["pairs"] >= 2 * SCENES
    folder = shutil.copytree(scenes["right"].parent, tmp_path / "moved")
    rows = json.loads((folder / "right.json").read_text())
    rows[3]["conversations"][1]["value"] = "Something that nobody has scored."
    (folder / "right.json").write_text(json.dumps(rows))
    journal_of_names = paths.refs(open_source(str(folder / "right.json")).digest)
    journal.append(journal_of_names, [{"name": "2.png", "key": image_key((folder / "2.png").read_bytes())}])
    (folder / "2.png").unlink()
    config = CacheConfig("scores", paths.root, data=(str(folder / "right.json"),), out=tmp_path / "some")
    found = cache(config)[paths.fingerprint]
    assert (found["samples"], found["samples without a score"]) == (SCENES, 1)
    html = (tmp_path / "some" / "scores.html").read_text()
    assert "1 pictures cannot be read now: 2.png" in html
    without_scores(paths, tmp_path / "bare")
    with pytest.raises(CacheError, match="has no pair scores; `llama3v encode --score` makes them"):
        cache(CacheConfig("scores", tmp_path / "bare", out=tmp_path / "none"))

"""Both stages from images to a model, at a size that takes seconds."""

import json
import re
import resource
import threading

import pytest
import torch
from rich.console import Console
from training import losses, make_pictures

from llama3v.config import EncodeConfig, PretrainConfig, SftConfig
from llama3v.errors import CacheError, CheckpointError, ConfigError, DataError, Llama3VError
from llama3v.feature_cache.reader import CacheReader
from llama3v.model.llama3v import build_model, load_model
from llama3v.train import run, step
from llama3v.train.meter import Meter
from llama3v.train.signals import StopRequest

CUT = 1  # of 2 layers: a top remains for policy seed


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory, data, tiny_vision_dir):
    from llama3v.feature_cache.encode import encode

    root = tmp_path_factory.mktemp("cache")
    encode(EncodeConfig(data=str(data), vision=str(tiny_vision_dir), cache=root, cut=CUT, max_tiles=4))
    return root


@pytest.fixture(scope="module")
def common(data, cache):
    return {
        "data": (str(data),),
        "cache": cache,
        "row_tokens": 128,
        "rows_per_step": 2,
        "rows_per_pass": 1,
        "checkpoint_every": 4,
        "steps": 12,
    }


@pytest.fixture(scope="module")
def stage1_options(common, tiny_vision_dir, tiny_llm_dir):
    return {
        **common,
        "vision": str(tiny_vision_dir),
        "llm": str(tiny_llm_dir),
        "cut": CUT,
        "max_tiles": 4,
        "learning_rate": 1e-2,
        "validation": common["data"][0],
        "validate_every": 5,
        "sample_every": 5,
    }


def quiet():
    return Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: PTH123


@pytest.fixture(scope="module")
def stage1(tmp_path_factory, stage1_options):
    out = tmp_path_factory.mktemp("stage1")
    summary = run.pretrain(PretrainConfig(out=out, **stage1_options), console=quiet())
    return out, summary


def test_pretrain_changes_the_projector_and_nothing_else(stage1, stage1_options):
    out, summary = stage1
    options = {k: stage1_options[k] for k in ("cut", "max_tiles")}
    before, _ = build_model(stage1_options["vision"], stage1_options["llm"], **options)
    after, _ = load_model(out)
    changed = {
        name.split(".")[0]
        for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert changed == {"projector"}
    assert summary["finished"]
    assert summary["loss"] < summary["first_loss"]


def test_a_run_leaves_what_it_promises(stage1):
    out, summary = stage1
    for name in ("config.json", "model.safetensors", "tokenizer.json", "curves.png", "ledger.jsonl", "report.html"):
        assert (out / name).is_file(), name
    assert json.loads((out / "summary.json").read_text()) == summary
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 13))
    assert [r["step"] for r in records if "validation_loss" in r] == [5, 10, 12]
    assert all(0 < r["mfu"] < 10 and r["memory_gb"] > 0 and r["seconds_left"] >= 0 for r in records if "loss" in r)
    assert summary["visual_tokens"] == sum(r["visual_tokens"] for r in records if "loss" in r) > 0
    assert summary["validation_loss_shuffled"] > 0
    assert summary["validation_shuffled"] == summary["validation_samples"] == 16
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        "LATEST",
        "step-00000008",
        "step-00000012",
    ]


def answers(out):
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def test_a_run_shows_what_it_answers_with_pictures(stage1):
    out, _ = stage1
    lines = answers(out)
    assert [line["step"] for line in lines] == [5, 10, 12]
    for line in lines:
        assert len(line["samples"]) == 8
        for sample in line["samples"]:
            assert sample["question"] == "What colour?"
            assert re.fullmatch(r"It is (red|green|blue|yellow)\.", sample["expected"])
            assert len(sample["pictures"]) == 1
            assert (out / sample["pictures"][0]).read_bytes().startswith(b"\x89PNG")
    assert len({sample["id"] for sample in lines[0]["samples"]}) == 8
    html = (out / "report.html").read_text()
    for part in (
        "finished after 12 steps",
        "What colour?",
        "step 12",
        "validation loss",
        "projector.*",
        "learning_rate",
    ):
        assert part in html
    assert html.count("<figure>") == 8


def test_sample_answers_are_those_of_the_model_alone(stage1, data):
    """Packed and batched with left padding, or one by one through the engine: the same greedy words."""
    from llama3v.engines.torch import TorchEngine
    from llama3v.model.prompt import Turn
    from llama3v.train.samples import ANSWER_TOKENS

    out, _ = stage1
    engine = TorchEngine(out)
    pictures = {row["id"]: data.parent / row["image"] for row in json.loads(data.read_text())}
    for sample in answers(out)[-1]["samples"][:3]:
        turns = [Turn("user", sample["question"], images=(0,))]
        image = pictures[sample["id"]].read_bytes()
        assert engine.answer(turns, [image], max_new_tokens=ANSWER_TOKENS) == sample["answer"]


@pytest.mark.parametrize(
    ("policy", "parts"),
    [
        ("projector+llm", {"projector", "llm"}),
        ("llm", {"llm"}),
        ("seed", {"projector", "vision.layers.1"}),
    ],
)
def test_each_policy_of_sft_trains_its_parts_and_lowers_the_loss(tmp_path, stage1, common, policy, parts):
    out, _ = stage1
    options = {**common, "model": str(out), "policy": policy, "learning_rate": 1e-2, "llm_learning_rate": 1e-2}
    summary = run.sft(SftConfig(out=tmp_path / "out", **options), console=quiet())
    assert summary["loss"] < summary["first_loss"] - 0.1
    before, after = load_model(out)[0], load_model(tmp_path / "out")[0]
    changed = set()
    for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True):
        if not torch.equal(a, b):
            changed.add(".".join(name.split(".")[:3]) if name.startswith("vision") else name.split(".")[0])
    assert changed == parts


def test_a_trained_model_sees(tmp_path, stage1, common, data):
    options = {**common, "steps": 60, "validation": str(data), "checkpoint_every": 100}
    config = SftConfig(
        out=tmp_path / "out", model=str(stage1[0]), learning_rate=1e-2, llm_learning_rate=1e-2, **options
    )
    summary = run.sft(config, console=quiet())
    assert summary["validation_loss"] < 0.3
    assert summary["validation_loss_shuffled"] > 2 * summary["validation_loss"]


def test_a_finished_run_that_is_run_again_returns_its_summary(stage1, stage1_options):
    out, summary = stage1
    console = quiet()
    assert run.pretrain(PretrainConfig(out=out, **stage1_options), console=console) == summary
    assert "finished" in console.export_text()
    with pytest.raises(CheckpointError, match=r"learning_rate was 0.01, now 0.5"):
        run.pretrain(PretrainConfig(out=out, **{**stage1_options, "learning_rate": 0.5}))


class _StopAfter(StopRequest):
    """Asks for a stop after some steps, as a signal would."""

    steps = 0

    def __init__(self):
        super().__init__()
        self.asked = 0

    def __getattribute__(self, name):
        if name == "requested":
            self.asked += 1
            if self.asked == type(self).steps:
                self._ask(15, None)
        return super().__getattribute__(name)


@pytest.fixture
def interrupted(monkeypatch, tmp_path, stage1_options):
    """A run of stage 1 that was stopped after 6 of its 12 steps, between two checkpoints and after a validation."""
    out = tmp_path / "interrupted"
    monkeypatch.setattr(_StopAfter, "steps", 7)
    with monkeypatch.context() as patch:
        patch.setattr(run, "StopRequest", _StopAfter)
        console = quiet()
        with pytest.raises(SystemExit) as stopped:
            run.pretrain(PretrainConfig(out=out, **stage1_options), console=console)
    assert stopped.value.code == 143
    assert "stopped by SIGTERM after step 6 of 12" in console.export_text()
    assert "stopped by SIGTERM after step 6 of 12" in (out / "report.html").read_text()
    assert not (out / "summary.json").exists()
    return out


def test_an_interrupted_run_resumes_to_the_same_bits(interrupted, stage1, stage1_options):
    before = json.loads((interrupted / "checkpoints" / "step-00000006" / "state.json").read_text())
    summary = run.pretrain(PretrainConfig(out=interrupted, **stage1_options), console=quiet())
    assert losses(interrupted) == losses(stage1[0])
    said = [
        [[sample["answer"] for sample in line["samples"]] for line in answers(out)] for out in (interrupted, stage1[0])
    ]
    assert said[0] == said[1]
    assert (interrupted / "model.safetensors").read_bytes() == (stage1[0] / "model.safetensors").read_bytes()
    for name in ("visual_tokens", "text_tokens", "supervised_tokens", "tiles"):
        assert summary[name] == stage1[1][name]
    assert summary["seconds"] > before["seconds"]


def test_a_run_stops_at_its_budget_and_goes_on_under_a_higher_one(tmp_path, monkeypatch, stage1, stage1_options):
    total = stage1[1]["tiles"]
    monkeypatch.setattr(Meter, "dollars", property(lambda meter: float(meter.counts["tiles"])))  # a dollar a tile
    options = {**stage1_options, "dollars_per_hour": 1e-9}
    for _ in range(2):  # the second time it is at the end of its budget already
        console = quiet()
        with pytest.raises(SystemExit) as stopped:
            run.pretrain(PretrainConfig(out=tmp_path, budget=total / 2, **options), console=console)
        assert stopped.value.code == 3
        said = re.search(r"stopped by the budget of \$(\S+) .* after step (\d+) of 12; (.*)", console.export_text())
        assert said is not None
        assert 1 < int(said[2]) < 12
        assert "its checkpoint is written: run the same command with a higher --budget" in said[3]
        assert (tmp_path / "checkpoints" / f"step-{int(said[2]):08d}").is_dir()
    summary = run.pretrain(PretrainConfig(out=tmp_path, budget=2.0 * total, **options), console=quiet())
    assert summary["tiles"] == total
    assert losses(tmp_path) == losses(stage1[0])


def test_checkpoints_for_a_machine_that_is_preempted_change_no_bit(tmp_path, stage1, stage1_options):
    run.pretrain(PretrainConfig(out=tmp_path, preemption_hours=1e-6, **stage1_options), console=quiet())
    assert losses(tmp_path) == losses(stage1[0])
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir())[1:] == ["step-00000011", "step-00000012"]


@pytest.mark.parametrize(
    "options", [{"budget": 5.0}, {"budget": 0.0, "dollars_per_hour": 1.0}, {"preemption_hours": 0.0}]
)
def test_options_of_price_and_preemption_must_make_sense(tmp_path, stage1_options, options):
    with pytest.raises(ConfigError, match=r"give more than 0"):
        PretrainConfig(out=tmp_path, **stage1_options, **options)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"steps": 14}, "steps was 12, now 14"),
        ({"seed": 3}, "options.seed was 0, now 3"),
        ({"row_tokens": 120}, "row_tokens was 128, now 120"),
        ({"limit": 7}, "limit was None, now 7"),
    ],
)
def test_drift_at_resume_is_refused_with_the_difference(interrupted, stage1_options, change, difference):
    with pytest.raises(CheckpointError, match=re.escape(difference)):
        run.pretrain(PretrainConfig(out=interrupted, **{**stage1_options, **change}), console=quiet())


def test_options_that_change_nothing_may_change_at_resume(interrupted, stage1, stage1_options):
    change = {"dollars_per_hour": 2.0, "checkpoint_every": 5, "keep_checkpoints": 1}
    summary = run.pretrain(PretrainConfig(out=interrupted, **{**stage1_options, **change}), console=quiet())
    assert losses(interrupted) == losses(stage1[0])
    assert summary["dollars"] > 0


def test_changed_data_at_resume_is_refused(interrupted, stage1_options, data, tmp_path):
    rows = json.loads(data.read_text())
    rows[3]["conversations"][1]["value"] = "It is purple."
    changed = data.with_name("changed.json")
    changed.write_text(json.dumps(rows))
    with pytest.raises(CheckpointError, match=r"made_from\.sources was"):
        run.pretrain(PretrainConfig(out=interrupted, **{**stage1_options, "data": (str(changed),)}), console=quiet())


def test_lost_prepared_data_is_made_again_and_the_run_goes_on(interrupted, stage1, stage1_options):
    (interrupted / "prepared" / "training" / "tokens.bin").write_bytes(b"damaged")
    run.pretrain(PretrainConfig(out=interrupted, **stage1_options), console=quiet())
    assert losses(interrupted) == losses(stage1[0])


def test_a_cache_of_another_cut_is_refused_with_the_difference(tmp_path, stage1_options):
    with pytest.raises(CacheError, match=r"vision\.cut: the cache has 1, asked for 2"):
        run.pretrain(PretrainConfig(out=tmp_path, **{**stage1_options, "cut": 2}), console=quiet())


def test_images_that_were_never_encoded_are_an_error_with_the_command(tmp_path, stage1_options):
    other = make_pictures(tmp_path / "other", count=3)
    for number in range(3):
        (other.parent / f"images/{number}.png").write_bytes((other.parent / f"images/{number}.png").read_bytes() + b"0")
    with pytest.raises(CacheError, match=r"llama3v encode --data .*train\.json --vision .* --cut 1 --cache"):
        run.pretrain(PretrainConfig(out=tmp_path, **{**stage1_options, "data": (str(other),)}), console=quiet())


def test_samples_that_cannot_be_used_are_left_out_with_a_reason(tmp_path, stage1_options, data):
    rows = json.loads(data.read_text())
    rows[0]["conversations"][1]["value"] = "long " * 200
    rows[1]["conversations"].pop()
    rows[2]["image"] = "images/unknown.png"
    path = data.with_name("spoilt.json")
    path.write_text(json.dumps(rows))
    options = {**stage1_options, "data": (str(path),), "steps": 2}
    with pytest.raises(DataError, match="max-bad-ratio"):
        run.pretrain(PretrainConfig(out=tmp_path / "strict", **options), console=quiet())
    summary = run.pretrain(PretrainConfig(out=tmp_path / "out", max_bad_ratio=0.5, **options), console=quiet())
    ledger = [json.loads(line) for line in (tmp_path / "out" / "ledger.jsonl").read_text().splitlines()]
    assert summary["left_out"] == 3
    assert summary["samples"] == 13
    reasons = {line["id"]: line["reason"] for line in ledger}
    assert reasons["picture-0"] == "longer than a row"
    assert reasons["picture-2"] == "image not in the cache"
    assert set(reasons) == {"picture-0", "picture-1", "picture-2"}
    with pytest.raises(DataError, match=r"sample picture-0: expected at most 128 tokens .* --too-long leave-out"):
        run.pretrain(PretrainConfig(out=tmp_path / "refused", too_long="error", **options), console=quiet())


def test_loss_that_stays_not_finite_stops_the_run(tmp_path, monkeypatch, stage1_options):
    monkeypatch.setattr(step, "supervised_loss", lambda hidden, *rest: hidden.sum() * float("nan"))
    with pytest.raises(ConfigError, match=r"not finite in 5 steps in a row \(1 to 5 of 12\)"):
        run.pretrain(PretrainConfig(out=tmp_path / "out", **stage1_options), console=quiet())
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [record["loss"] for record in records] == [None] * 4


def test_single_bad_steps_are_counted_and_skipped(tmp_path, monkeypatch, stage1_options):
    calls = []

    def poisoned(*arguments):
        calls.append(None)
        return real(*arguments) * (float("nan") if len(calls) in (3, 9) else 1.0)

    real = step.supervised_loss
    monkeypatch.setattr(step, "supervised_loss", poisoned)
    summary = run.pretrain(PretrainConfig(out=tmp_path / "out", **stage1_options), console=quiet())
    assert summary["skipped_steps"] == 2
    assert summary["steps"] == 12


def test_a_full_disk_stops_with_a_clear_error_and_the_run_goes_on_afterwards(tmp_path, stage1, stage1_options):
    config = PretrainConfig(out=tmp_path, **stage1_options)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))  # less than the moments, more than anything before
    try:
        with pytest.raises(CheckpointError, match="no space"):
            run.pretrain(config, console=quiet())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run.pretrain(config, console=quiet())
    assert losses(tmp_path) == losses(stage1[0])


def test_a_damaged_record_stops_the_run_and_keeps_the_steps_before(tmp_path, monkeypatch, stage1, stage1_options):
    reads = []

    def read_many(self, keys):
        if threading.current_thread() is not threading.main_thread():  # where validation reads
            reads.extend(keys)
        if len(reads) >= 40:
            raise CacheError(f"record {keys[0]} is damaged")
        return real(self, keys)

    real = CacheReader.read_many
    with monkeypatch.context() as patch:
        patch.setattr(CacheReader, "read_many", read_many)
        with pytest.raises(CacheError, match="is damaged"):
            run.pretrain(PretrainConfig(out=tmp_path, **{**stage1_options, "checkpoint_every": 100}), console=quiet())
    assert list((tmp_path / "checkpoints").glob("step-*"))
    run.pretrain(PretrainConfig(out=tmp_path, **stage1_options), console=quiet())
    assert losses(tmp_path) == losses(stage1[0])


def test_a_second_process_in_the_same_directory_is_refused(tmp_path, stage1_options):
    with run._only_run_in(tmp_path), pytest.raises(Llama3VError, match="another process"):
        run.pretrain(PretrainConfig(out=tmp_path, **stage1_options), console=quiet())


def test_bf16_trains_too(tmp_path, stage1, common):
    options = {**common, "model": str(stage1[0]), "learning_rate": 1e-2, "llm_learning_rate": 1e-2}
    summary = run.sft(SftConfig(out=tmp_path / "out", precision="bf16", **options), console=quiet())
    assert summary["loss"] < summary["first_loss"] - 0.1
    assert all(p.dtype == torch.float32 for p in load_model(tmp_path / "out")[0].parameters())

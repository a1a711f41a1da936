"""One training part: the trainer's own rows, loader thread and `train_step`, on random weights and features."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any

import torch

from benchmarks.gpu.kernels import where_time_goes
from benchmarks.gpu.lora import add_lora
from benchmarks.gpu.parts import Training
from benchmarks.gpu.rate import wait
from benchmarks.gpu.setting import Setting
from benchmarks.train_shapes import RandomFeatures, counts_of, prepared, random_model
from benchmarks.train_step import adamw, optimizer_step, pass_loss, set_modes, trained
from llama3v.data.packing import fill
from llama3v.model.llama3v import Llama3VForConditionalGeneration
from llama3v.train.batches import Ahead, Batch, Pass, RowPlan, make_pass
from llama3v.train.work import work_of

SAMPLES = 1024
WARM_UP = 2  # steps: allocations, the choice of kernels, compilation


def measure_training(training: Training, setting: Setting, device: torch.device) -> dict[str, Any]:
    """Figures of the largest pass that fits; `too_large` names those that did not.

    Raises torch.OutOfMemoryError where none fits.
    """
    too_large = []
    for rows, row_tokens in setting.passes:
        try:
            return _Run(training, setting, device, rows, row_tokens).measure() | {"too_large": too_large}
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            too_large.append(f"{rows} x {row_tokens}")
        gc.collect()  # after the except block: the error's traceback held the model
        torch.cuda.empty_cache()
    raise torch.OutOfMemoryError(f"not even a pass of {too_large[-1]} tokens fits")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device's memory was full: torch says so, or a library of NVIDIA's that asked for some itself."""
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)


class _Run:
    def __init__(self, training: Training, setting: Setting, device: torch.device, rows: int, row_tokens: int) -> None:
        self.training, self.setting, self.device = training, setting, device
        self.bf16 = training.weights != "bf16"  # else there is nothing left to cast
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.model = make_model(training, setting, device)
        self.parameters = trained(self.model)
        self.optimizer = adamw(self.parameters)
        self.data = prepared(setting.samples(training.stage, SAMPLES), setting.shape)
        lengths = self.data.lengths.tolist()
        per_step = max(rows, setting.step_tokens // row_tokens)
        self.plan = RowPlan(lengths, row_tokens, per_step, rows, seed=0)
        self.fill = fill(self.plan.epoch(0), lengths, row_tokens)
        self.row_tokens = row_tokens
        self.source = RandomFeatures(setting.shape.tower)

    def make(self, number: int) -> Pass:
        return make_pass(number, self.plan, self.data, self.source, self.setting.shape.llm.vocabulary)

    def measure(self) -> dict[str, Any]:
        steps = WARM_UP + self.setting.rounds + 1
        ahead = Ahead(self.make, range(steps * self.plan.passes_per_step))
        try:
            for _ in range(WARM_UP):
                self.step(ahead)
            begun, waited = perf_counter(), ahead.waited
            timed = [self.step(ahead) for _ in range(self.setting.rounds)]
            wait_share = (ahead.waited - waited) / (perf_counter() - begun)
            kernels = where_time_goes(lambda: self.step(ahead), self.device)
        finally:
            ahead.close()
        totals = {name: sum(step.counts[name] for step in timed) for name in timed[0].counts}
        seconds = sum(step.seconds for step in timed)
        tokens = totals["visual_tokens"] + totals["text_tokens"]
        samples = tokens / float(self.data.lengths.mean())
        return {
            "rows_per_pass": self.plan.rows_per_pass,
            "row_tokens": self.row_tokens,
            "passes_per_step": self.plan.passes_per_step,
            "row_fill": self.fill,
            "trained_parameters": sum(parameter.numel() for parameter in self.parameters),
            "step_seconds": median(step.seconds for step in timed),
            "forward_backward_seconds": self.forward_backward_alone(),
            "wait_share": wait_share,
            "tokens_per_second": tokens / seconds,
            "tiles_per_second": totals["tiles"] / seconds,
            "samples_per_second": samples / seconds,
            "model_flops_per_second": work_of(self.model, live_trunk=False).flops(totals) / seconds,
            "peak_bytes": torch.cuda.max_memory_allocated() if self.device.type == "cuda" else None,
            "loss": timed[-1].loss,
            "kernels": kernels,
        }

    def step(self, ahead: "Ahead[Pass]") -> "_Step":
        """One optimizer step, as Loop takes it."""
        batches: list[Batch] = []

        def passes() -> Iterator[tuple[Batch, int]]:
            for _ in range(self.plan.passes_per_step):
                one = ahead.next()
                batches.append(replace(one.batch, features=None))
                tiles.append(one.batch.tiles)
                yield one.batch, one.supervised_of_step

        tiles: list[int] = []
        begun = perf_counter()
        loss = optimizer_step(self.model, self.optimizer, passes(), bf16=self.bf16)
        wait(self.device)  # the optimizer's kernels, too
        seconds = perf_counter() - begun
        counts = [counts_of(batch) | {"tiles": number} for batch, number in zip(batches, tiles, strict=True)]
        return _Step(seconds, loss, {name: sum(one[name] for one in counts) for name in counts[0]})

    def forward_backward_alone(self) -> float:
        """Median seconds of the passes of a step whose rows are on the device already; no optimizer."""
        passes = [self.make(number) for number in range(self.plan.passes_per_step)]
        batches = [(one.batch.to(self.device), one.supervised_of_step) for one in passes]
        times = []
        for _ in range(3):
            wait(self.device)
            begun = perf_counter()
            for batch, total in batches:
                pass_loss(self.model, batch, total, bf16=self.bf16).backward()
            wait(self.device)
            times.append(perf_counter() - begun)
            self.optimizer.zero_grad(set_to_none=True)
        return median(times)


@dataclass(frozen=True)
class _Step:
    seconds: float
    loss: float
    counts: dict[str, int]


def make_model(training: Training, setting: Setting, device: torch.device) -> Llama3VForConditionalGeneration:
    """A model held and prepared as the part says."""
    dtype = torch.float32 if training.weights == "fp32" else torch.bfloat16
    model = random_model(setting.shape, device=device, dtype=dtype)
    if training.weights == "bf16 frozen":
        model.projector.float()
    model.projector.requires_grad_(True)
    if training.trains == "lora":
        add_lora(model.llm, setting.lora_rank)
    elif training.trains == "full":
        model.llm.requires_grad_(True)
    if training.recompute:
        model.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if training.compiled:
        for layer in model.llm.model.layers:
            layer.compile(dynamic=True)  # one after another, each with the first one's code
    set_modes(model)
    return model

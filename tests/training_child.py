"""Imported once by the server that forks the children of the fault tests: all that is slow to import is here."""

import errno
import os
import sys
from itertools import count
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # of this process: the server, before torch is there

import matplotlib.backends.backend_agg  # noqa: F401
import torch._dynamo
import transformers.models.auto.tokenization_auto
import transformers.models.llama.modeling_llama
import transformers.models.siglip.modeling_siglip  # noqa: F401
from training import FAULT_VARIABLE

import llama3v.cli
import llama3v.feature_cache.encode
import llama3v.feature_cache.ring.follow
import llama3v.train.run
import llama3v.train.step


def inject(kind: str, rank: str, number: str) -> None:
    """nan: that pass's loss is not a number. full: from that flush on, the disk is full."""
    if os.environ.get("RANK", "0") != rank:
        return
    calls = count(1)

    def full(descriptor: int) -> None:
        if next(calls) >= int(number):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = llama3v.train.step.supervised_loss

    def broken(*arguments: Any) -> torch.Tensor:
        return real(*arguments) * (float("nan") if next(calls) == int(number) else 1.0)

    if kind == "full":
        os.fsync = full
    else:
        llama3v.train.step.supervised_loss = broken


def run(verb: str, options: Any, environment: dict[str, str], log: Path) -> None:
    """What the command line does with parsed options."""
    os.environ.update(environment)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if fault := os.environ.get(FAULT_VARIABLE):
        inject(*fault.split(":"))
    functions = {
        "pretrain": llama3v.train.run.pretrain,
        "sft": llama3v.train.run.sft,
        "encode": llama3v.feature_cache.encode.encode,
    }
    llama3v.cli.parse = lambda arguments: (verb, options)  # type: ignore[assignment]
    llama3v.cli._run = lambda verb, options: functions[verb](options)  # type: ignore[assignment, misc, return-value]
    sys.exit(llama3v.cli.main([]))

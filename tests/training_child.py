"""Imported once by the server that forks the children of the fault tests: all that is slow to import is here."""

import os
import sys
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # of this process: the server, before torch is there

import matplotlib.backends.backend_agg  # noqa: F401
import torch._dynamo
import transformers.models.auto.tokenization_auto
import transformers.models.llama.modeling_llama
import transformers.models.siglip.modeling_siglip  # noqa: F401

import llama3v.cli
import llama3v.feature_cache.encode
import llama3v.feature_cache.ring.follow
import llama3v.train.run


def run(verb: str, options: Any, environment: dict[str, str], log: Path) -> None:
    """What the command line does with parsed options."""
    os.environ.update(environment)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    functions = {
        "pretrain": llama3v.train.run.pretrain,
        "sft": llama3v.train.run.sft,
        "encode": llama3v.feature_cache.encode.encode,
    }
    llama3v.cli.parse = lambda arguments: (verb, options)  # type: ignore[assignment]
    llama3v.cli._run = lambda verb, options: functions[verb](options)  # type: ignore[assignment, misc, return-value]
    sys.exit(llama3v.cli.main([]))

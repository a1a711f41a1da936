"""Every option of every verb: frozen dataclasses, each field documented; the only place a default lives.

The command line is made from these (see cli.py), and the Python functions take them, for example
``llama3v.cache(llama3v.CacheConfig(action="info", cache=Path("/nvme/cache")))``.
"""

from llama3v.config.base import Codec, MaybeFloat, MaybeInt, MaybePath, MaybeText, Precision
from llama3v.config.encode import CacheConfig, EncodeConfig, Engine, QuickstartConfig
from llama3v.config.evaluate import AblateConfig, CompareConfig, EvalConfig
from llama3v.config.run import (
    AnswerWeights,
    AskConfig,
    CaptionConfig,
    ChatConfig,
    Detail,
    DoctorConfig,
    ExportConfig,
    KvType,
    MaybeRuntime,
    Running,
    Runtime,
    Sampling,
    ServeConfig,
    Weights,
)
from llama3v.config.train import (
    MAX_TILES,
    Attention,
    LlmWeights,
    MergeConfig,
    Mode,
    Parallel,
    Policy,
    PretrainConfig,
    Recipe,
    SftConfig,
    Tracker,
    TrainConfig,
)

__all__ = [
    "MAX_TILES",
    "AblateConfig",
    "AnswerWeights",
    "AskConfig",
    "Attention",
    "CacheConfig",
    "CaptionConfig",
    "ChatConfig",
    "Codec",
    "CompareConfig",
    "Detail",
    "DoctorConfig",
    "EncodeConfig",
    "Engine",
    "EvalConfig",
    "ExportConfig",
    "KvType",
    "LlmWeights",
    "MaybeFloat",
    "MaybeInt",
    "MaybePath",
    "MaybeRuntime",
    "MaybeText",
    "MergeConfig",
    "Mode",
    "Parallel",
    "Policy",
    "Precision",
    "PretrainConfig",
    "QuickstartConfig",
    "Recipe",
    "Running",
    "Runtime",
    "Sampling",
    "ServeConfig",
    "SftConfig",
    "Tracker",
    "TrainConfig",
    "Weights",
]

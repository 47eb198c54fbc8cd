"""lazyllm: long prompts made fast on any Hugging Face decoder, without training.

It computes a prompt token at a layer only when it matters for the next token, and can take up any
skipped token later where it stopped (LazyLLM, Fu et al. 2024, arXiv 2407.14057).
"""

from lazyllm.caches import CACHES, AuxCache, CachePolicy, DenseCache, DropCache, LazyCache
from lazyllm.callbacks import Callback, ProgressBar, TokenTrace
from lazyllm.config import LazyConfig, preset_names
from lazyllm.errors import (
    AttachError,
    CacheError,
    ConfigError,
    InputError,
    LazyLLMError,
    PolicyError,
    UnsupportedModelError,
)
from lazyllm.pipeline import LazyPipeline, TextStream
from lazyllm.policies import (
    SCHEDULES,
    SCORERS,
    Constant,
    LastTokenAttention,
    Linear,
    Protect,
    Random,
    Schedule,
    ScoreContext,
    Scorer,
    SinkRecent,
    Stages,
    WindowAttention,
)
from lazyllm.result import GenerationResult, GenerationStats

__version__ = "0.1.0"

__all__ = [
    "CACHES",
    "SCHEDULES",
    "SCORERS",
    "AttachError",
    "AuxCache",
    "CacheError",
    "CachePolicy",
    "Callback",
    "ConfigError",
    "Constant",
    "DenseCache",
    "DropCache",
    "GenerationResult",
    "GenerationStats",
    "InputError",
    "LastTokenAttention",
    "LazyCache",
    "LazyConfig",
    "LazyLLMError",
    "LazyPipeline",
    "Linear",
    "PolicyError",
    "ProgressBar",
    "Protect",
    "Random",
    "Schedule",
    "ScoreContext",
    "Scorer",
    "SinkRecent",
    "Stages",
    "TextStream",
    "TokenTrace",
    "UnsupportedModelError",
    "WindowAttention",
    "preset_names",
]

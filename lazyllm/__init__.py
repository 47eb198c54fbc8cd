"""lazyllm: long prompts made fast on any Hugging Face decoder, without training.

It computes a prompt token at a layer only when it matters for the next token, and can take up any
skipped token later where it stopped (LazyLLM, Fu et al. 2024, arXiv 2407.14057).
"""

import lazyllm.quiet  # noqa: F401  # before anything else imports transformers

# isort: split
from lazyllm.caches import (
    CACHES,
    AuxCache,
    CachePolicy,
    DenseCache,
    DropCache,
    LazyCache,
    OffloadedAux,
    QuantizedAux,
    QuantizedKV,
)
from lazyllm.caches.row import PromptMarks
from lazyllm.callbacks import Callback, ProgressBar, TokenTrace
from lazyllm.config import LazyConfig, preset_names
from lazyllm.errors import (
    AttachError,
    CacheError,
    ConfigError,
    EngineError,
    InputError,
    LazyLLMError,
    PolicyError,
    UnsupportedModelError,
)
from lazyllm.pipeline import LazyPipeline, TextStream
from lazyllm.policies import (
    SCHEDULES,
    SCORERS,
    AttentionMass,
    Blockwise,
    ByQuestion,
    Combined,
    Constant,
    FullBelow,
    Funnel,
    LastTokenAttention,
    LateInteraction,
    LexicalOverlap,
    Linear,
    PerPhase,
    Pooled,
    Protect,
    Random,
    Schedule,
    ScoreContext,
    Scorer,
    SinkRecent,
    Stages,
    TwoHop,
    WindowAttention,
)
from lazyllm.result import GenerationResult, GenerationStats

__version__ = "0.1.0"

__all__ = [
    "CACHES",
    "SCHEDULES",
    "SCORERS",
    "AttachError",
    "AttentionMass",
    "AuxCache",
    "Blockwise",
    "ByQuestion",
    "CacheError",
    "CachePolicy",
    "Callback",
    "Combined",
    "ConfigError",
    "Constant",
    "DenseCache",
    "DropCache",
    "EngineError",
    "FullBelow",
    "Funnel",
    "GenerationResult",
    "GenerationStats",
    "InputError",
    "LastTokenAttention",
    "LateInteraction",
    "LazyCache",
    "LazyConfig",
    "LazyLLMError",
    "LazyPipeline",
    "LexicalOverlap",
    "Linear",
    "OffloadedAux",
    "PerPhase",
    "PolicyError",
    "Pooled",
    "ProgressBar",
    "PromptMarks",
    "Protect",
    "QuantizedAux",
    "QuantizedKV",
    "Random",
    "Schedule",
    "ScoreContext",
    "Scorer",
    "SinkRecent",
    "Stages",
    "TextStream",
    "TokenTrace",
    "TwoHop",
    "UnsupportedModelError",
    "WindowAttention",
    "preset_names",
]

"""lazyllm: long prompts made fast on any Hugging Face decoder, without training.

It computes a prompt token at a layer only when it matters for the next token, and can take up any
skipped token later where it stopped (LazyLLM, Fu et al. 2024, arXiv 2407.14057).
"""

import lazyllm.quiet  # noqa: F401  # before anything else imports transformers

# isort: split
from lazyllm.caches import CACHES, AuxCache, CachePolicy, DenseCache, DropCache, LazyCache
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
    Cosine,
    FullBelow,
    Funnel,
    LastTokenAttention,
    LateInteraction,
    LexicalOverlap,
    Linear,
    PerPhase,
    Pooled,
    Power,
    Protect,
    Pyramid,
    Random,
    Schedule,
    ScoreContext,
    ScoreGap,
    Scorer,
    SinkRecent,
    Stages,
    TokenBudget,
    Tuned,
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
    "Cosine",
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
    "PerPhase",
    "PolicyError",
    "Pooled",
    "Power",
    "ProgressBar",
    "PromptMarks",
    "Protect",
    "Pyramid",
    "Random",
    "Schedule",
    "ScoreContext",
    "ScoreGap",
    "Scorer",
    "SinkRecent",
    "Stages",
    "TextStream",
    "TokenBudget",
    "TokenTrace",
    "Tuned",
    "TwoHop",
    "UnsupportedModelError",
    "WindowAttention",
    "preset_names",
]

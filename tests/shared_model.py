"""What one of two processes that share a model does; run by torchrun, and by the test in one process.

python -m torch.distributed.run --standalone --nproc_per_node 2 -m tests.shared_model FOLDER
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from lazyllm import (
    AccumulatedAttention,
    AuxCache,
    Combined,
    EvictingCache,
    KeyNorm,
    LastTokenAttention,
    LateInteraction,
    LazyLLMError,
    LazyPipeline,
    MultiLayerAttention,
    NextLayerAttention,
    Oracle,
    Random,
    ScoreContext,
    Scorer,
    Stages,
    UpdateNorm,
    ValueWeightedAttention,
    WindowAttention,
)
from lazyllm.models.families import contract_of
from tests.histories import new_history
from tests.tiny import random_ids

STAGES = Stages({1: 0.7, 2: 0.5, 3: 0.3})


class OfRawTensors(Scorer):
    """Reads queries, keys and values itself, as a scorer of a user's own may."""

    needs_attention = True

    def score(self, context: ScoreContext) -> torch.Tensor:
        attention = context.layer_attention
        columns = attention.columns(context.tokens)
        keys, values = attention.keys[:, columns], attention.values[:, columns]
        return attention.queries[:, -1].square().max() * keys.square().sum((0, 2)) - values.abs().amax((0, 2))


class OfThisProcess(Scorer):
    """Scores that differ from process to process, as rounding may make them."""

    def score(self, context: ScoreContext) -> torch.Tensor:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        return ((context.tokens + 1) * (7 + 4 * rank) % 23).double()


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "last token": ("llama", {"scorer": LastTokenAttention()}),
    "window": ("llama", {"scorer": WindowAttention(window=4, pool=3)}),
    "maximum over heads": ("llama", {"scorer": WindowAttention(window=4, heads="max")}),
    "late interaction": ("llama", {"scorer": LateInteraction(query=3, pool=3)}),
    "key norm": ("llama", {"scorer": KeyNorm()}),
    "value weighted": ("llama", {"scorer": ValueWeightedAttention(window=4, heads="max")}),
    "accumulated": ("llama", {"scorer": AccumulatedAttention()}),
    "several layers": ("llama", {"scorer": MultiLayerAttention(layers=2, window=3)}),
    "next layer": ("llama", {"scorer": NextLayerAttention(window=3)}),
    "update norm": ("llama", {"scorer": UpdateNorm()}),
    "oracle": ("llama", {"scorer": Oracle(answer=(5, 9))}),
    "combined": ("llama", {"scorer": Combined([(LastTokenAttention(), 1.0), (Random(), 0.1)])}),
    "raw tensors": ("llama", {"scorer": OfRawTensors()}),
    "rounding": ("llama", {"scorer": OfThisProcess()}),
    "evicting": ("llama", {"cache": EvictingCache(scorer=AccumulatedAttention(), budget=9, when="decode")}),
    "evicting by rounding": ("llama", {"cache": EvictingCache(scorer=OfThisProcess(), budget=9, when="decode")}),
    "chunks": ("llama", {"scorer": WindowAttention(window=12), "chunk": 5}),
    "norms of heads": ("qwen3", {"scorer": LastTokenAttention()}),
    "heads that every process has": ("phi3", {"scorer": WindowAttention(window=4)}),
    "two ropes": ("gemma3_text", {"scorer": WindowAttention(window=4)}),
    "experts": ("mixtral", {"scorer": LastTokenAttention()}),
}
FAMILIES = sorted({family for family, _ in CASES.values()})


def run(model: PreTrainedModel, policies: dict[str, Any]) -> dict[str, Any]:
    """Prefill and three steps over two rows: which tokens were visible and attended where, and all logits."""
    history = new_history(model, **{"schedule": STAGES, "cache": AuxCache(), **policies})
    history.step(random_ids(2, 24))
    for seed in range(1, 4):
        history.step(random_ids(2, 1, seed))
    return {
        "kept": [
            [[(row.visible.tolist(), row.attended.tolist()) for row in event.rows] for event in step]
            for step in history.steps
        ],
        "logits": [logits.nan_to_num(0) for logits in history.logits],
        "kv_bytes": history.cache.kv_bytes,
    }


def reply(model: PreTrainedModel) -> list[int]:
    """What a pipeline generates greedily."""
    pipe = LazyPipeline(model, scorer=LastTokenAttention(), schedule=STAGES)
    return pipe.generate(random_ids(1, 30)[0], max_new_tokens=8, min_new_tokens=8, do_sample=False).token_ids


def files(model: PreTrainedModel, folder: Path, rank: int) -> tuple[bool, str]:
    """Whether a process takes up the cache it saved, and why not that of the other."""
    history = new_history(model, schedule=STAGES, cache=AuxCache())
    history.step(random_ids(1, 12))
    history.cache.save(folder / f"cache-{rank}")
    torch.distributed.barrier()
    own = history.pipe.load_cache(folder / f"cache-{rank}").columns == 12
    return own, refusal(lambda: history.pipe.load_cache(folder / f"cache-{1 - rank}"))


def too_few_heads(folder: Path) -> str:
    """Why a model with one key head is refused."""
    path = folder / "one key head"
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=DistributedConfig(tp_size=2))
    return refusal(lambda: LazyPipeline(model))


def spread_by_hand(folder: Path, mesh: Any) -> str:
    """Why a model that torch has spread over processes is refused."""
    model = AutoModelForCausalLM.from_pretrained(folder / "llama")
    parallelize_module(model.model.layers[1].mlp, mesh, {"up_proj": ColwiseParallel()})
    return refusal(lambda: LazyPipeline(model))


def refusal(act: Any) -> str:
    """What the error says that `act` ends with."""
    try:
        act()
    except LazyLLMError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def main(folder: Path) -> None:
    """Does all of it, and writes down what came out."""
    models = {
        family: AutoModelForCausalLM.from_pretrained(
            folder / family,
            dtype=torch.float64,
            experts_implementation="eager",  # the others take no float64
            distributed_config=DistributedConfig(tp_size=2),
        )
        for family in FAMILIES
    }
    rank = torch.distributed.get_rank()
    answers: dict[str, Any] = {name: run(models[family], policies) for name, (family, policies) in CASES.items()}
    answers["reply"] = reply(models["llama"])
    answers["files"] = files(models["llama"], folder, rank)
    answers["too few heads"] = too_few_heads(folder)
    known = contract_of(models["llama"])
    answers["contract is kept"] = contract_of(models["llama"], known=known) is known
    answers["by hand"] = spread_by_hand(folder, models["llama"]._device_mesh["tp"])
    torch.save(answers, folder / f"answers-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

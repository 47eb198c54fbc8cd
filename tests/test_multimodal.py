"""Models that read images: their prompts are pruned like text, or refused with the reason."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    LlamaConfig,
    LlavaConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)

from lazyllm import AuxCache, Constant, InputError, LastTokenAttention, LazyPipeline, NextLayerAttention, TokenTrace
from lazyllm.models.masks import Seen
from tests.histories import Moving
from tests.replay import replay
from tests.tiny import LAYERS, VOCABULARY, WINDOW, random_ids, word_tokenizer

GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
IMAGE, VISION_START, VISION_END, VIDEO = 90, 91, 92, 93
SIDE = 8
"""Pixels of an image's side."""

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
"""Pairs of a head's 8 dimensions that go by time, row and column."""
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 1}


def llava() -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=2,
        projection_dim=16,
    )
    return LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, image_seq_length=16)


def gemma3() -> Gemma3Config:
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=2,
        vision_use_head=False,
    )
    text = {**TEXT, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW, "sliding_window_pattern": 2}
    return Gemma3Config(vision_config=vision.to_dict(), text_config=text, mm_tokens_per_image=16, image_token_id=IMAGE)


def qwen(kind: str, **vision: Any) -> Any:
    text = {**TEXT, "rope_parameters": MROPE, **({"head_dim": 8} if kind == "qwen3_vl" else {})}
    return AutoConfig.for_model(kind, vision_config={**QWEN_VISION, **vision}, text_config=text, **TOKENS)


CONFIGS = {
    "llava": llava,
    "gemma3": gemma3,
    "qwen2_vl": lambda: qwen("qwen2_vl", embed_dim=16, hidden_size=32),
    "qwen2_5_vl": lambda: qwen(
        "qwen2_5_vl", hidden_size=16, out_hidden_size=32, intermediate_size=24, window_size=4, fullatt_block_indexes=[1]
    ),
    "qwen3_vl": lambda: qwen(
        "qwen3_vl",
        hidden_size=16,
        out_hidden_size=32,
        intermediate_size=24,
        deepstack_visual_indexes=[0],
        num_position_embeddings=16,
    ),
}
THREE_AXES = ("qwen2_vl", "qwen2_5_vl")
"""Models whose RoPE sees a time, a row and a column."""
WITH_IMAGES = ("llava", "gemma3", *THREE_AXES)
"""Models that prune prompts with images."""


@cache
def model_of(kind: str) -> PreTrainedModel:
    config = CONFIGS[kind]()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float64, attn_implementation="sdpa")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return model.requires_grad_(False).eval()


@dataclass(frozen=True)
class Picture:
    """A prompt with one image in the middle, and what the model is given with it."""

    ids: torch.Tensor
    inputs: dict[str, Any]


KINDS = ("token_type_ids", "mm_token_type_ids")
"""What says of every token whether it is of an image."""


def picture(kind: str, columns: int = 8, text: int = 20) -> Picture:
    generator = torch.Generator().manual_seed(3)
    if kind in ("llava", "gemma3"):
        tokens, pixels = 16, torch.randn(1, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
        inputs = {"pixel_values": pixels}
    else:
        tokens = columns  # 4 rows of patches, of which 2 x 2 make a token
        inputs = {
            "pixel_values": torch.randn(4 * columns, 12, generator=generator, dtype=torch.float64),
            "image_grid_thw": torch.tensor([[1, 4, columns]]),
        }
    words = random_ids(1, text) % 80 + 3
    ids = torch.cat([words[:, :9], torch.full((1, tokens), IMAGE), words[:, 9:]], dim=1)
    kinds = (ids == IMAGE).int()
    if kind == "gemma3":
        inputs["token_type_ids"] = kinds
    elif kind != "llava":
        inputs["mm_token_type_ids"] = kinds
    return Picture(ids, inputs)


@torch.no_grad()
def stock_reply(model: PreTrainedModel, ids: torch.Tensor, **inputs: Any) -> list[int]:
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **inputs, **GREEDY)
    return output[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("kind", CONFIGS)
def test_text_alone_is_the_model_itself_where_nothing_is_pruned(kind: str):
    model, ids = model_of(kind), random_ids(1, 24) % 80 + 3
    pipe = LazyPipeline.from_preset("dense", model)
    with torch.no_grad():
        expected = model(ids).logits
        with pipe.attached() as attached:
            got = attached(ids, past_key_values=pipe.new_cache()).logits
    assert torch.equal(got, expected)
    assert pipe.generate(ids[0], **GREEDY).token_ids == stock_reply(model, ids)


@pytest.mark.parametrize("kind", CONFIGS)
def test_text_alone_is_pruned_and_replays(kind: str):
    assert_pruned_and_replayed(model_of(kind), random_ids(1, 24) % 80 + 3, {})


@pytest.mark.parametrize("kind", WITH_IMAGES)
def test_an_image_is_the_models_own_where_nothing_is_pruned(kind: str):
    model, shown = model_of(kind), picture(kind)
    pipe = LazyPipeline.from_preset("dense", model)
    with torch.no_grad():
        expected = model(shown.ids, **shown.inputs).logits
        with pipe.attached() as attached:
            got = attached(shown.ids, past_key_values=pipe.new_cache(), **shown.inputs).logits
        assert torch.equal(got, expected)
        other = {**shown.inputs, "pixel_values": -shown.inputs["pixel_values"]}
        assert (model(shown.ids, **other).logits - expected).abs().max() > 1e-3, "the image does nothing"
    reply = pipe.generate(shown.ids[0], **shown.inputs, **GREEDY).token_ids
    assert reply == stock_reply(model, shown.ids, **shown.inputs)


@pytest.mark.parametrize("kind", WITH_IMAGES)
@pytest.mark.parametrize(
    "policies",
    [{}, {"chunk": 5}, {"scorer": NextLayerAttention(window=3)}, {"cache": AuxCache(attend="cached")}],
    ids=str,
)
def test_an_image_is_pruned_and_replays(kind: str, policies: dict[str, Any]):
    shown = picture(kind)
    assert_pruned_and_replayed(model_of(kind), shown.ids, shown.inputs, **policies)


@torch.no_grad()
def assert_pruned_and_replayed(
    model: PreTrainedModel, ids: torch.Tensor, inputs: dict[str, Any], **policies: Any
) -> None:
    """A prefill and three steps, against one dense forward with the masks that they had."""
    trace = TokenTrace()
    pipe = LazyPipeline(model, **{"scorer": Moving(), "schedule": Constant(0.5, start=1), **policies})
    past, prompt, logits = pipe.new_cache(), ids.shape[1], []
    with pipe.attached(callbacks=[trace], missing="nan") as attached:
        logits.append(attached(ids, past_key_values=past, **inputs).logits[0])
        for seed in range(1, 4):
            ids = torch.cat([ids, random_ids(1, 1, seed) % 80 + 3], dim=1)
            logits.append(attached(ids[:, -1:], past_key_values=past).logits[0])
    assert sum(event.rows[0].revived.numel() for step in trace.steps for event in step) > 0
    kinds = {name: pad_kinds(value, ids.shape[1]) for name, value in inputs.items()}
    places = places_of(model, ids[:, :prompt], inputs, ids.shape[1]) if "image_grid_thw" in inputs else None
    reach = reach_of(ids[0]) if "token_type_ids" in inputs else None
    expected, _ = replay(model, ids[0], trace.steps, 0, places=places, reach=reach, inputs=kinds)
    got = torch.cat(logits)
    reached = ~got.isnan().any(-1)
    assert reached[-4:].all()
    assert not reached.all()
    torch.testing.assert_close(got[reached], expected[reached], rtol=0, atol=1e-10)


def reach_of(ids: torch.Tensor) -> torch.Tensor:
    """The last position that each token [t] sees: the end of the one image for its tokens."""
    own, image = torch.arange(ids.numel()), ids == IMAGE
    return torch.where(image, own[image].max(), own)


def pad_kinds(value: Any, length: int) -> Any:
    """The kinds of tokens, said of those that came later too."""
    is_kinds = isinstance(value, torch.Tensor) and value.dtype == torch.int
    return torch.nn.functional.pad(value, (0, length - value.shape[1])) if is_kinds else value


def places_of(model: Any, ids: torch.Tensor, inputs: dict[str, Any], length: int) -> torch.Tensor:
    """Where the model's own code puts the tokens [3, 1, t]; those behind the prompt follow its last one."""
    known = {name: inputs[name] for name in ("image_grid_thw", "mm_token_type_ids")}
    places, _ = model.model.get_rope_index(ids, **known)
    later = torch.arange(1, length - ids.shape[1] + 1) + places.max()
    return torch.cat([places, later.expand(3, 1, -1)], dim=-1)


@pytest.mark.parametrize("kind", WITH_IMAGES)
def test_a_further_turn_stands_behind_the_image(kind: str):
    """Though another image was shown in between, from which the model counts when it is asked."""
    model, shown = model_of(kind), picture(kind)
    pipe = LazyPipeline.from_preset("dense", model)
    reply = pipe.generate(shown.ids[0], **shown.inputs, **GREEDY).token_ids
    more = torch.cat([shown.ids, torch.tensor([reply]), random_ids(1, 6, 5) % 80 + 3], dim=1)
    kinds = {name: pad_kinds(value, more.shape[1]) for name, value in shown.inputs.items() if name in KINDS}
    asked = {"output_logits": True, "return_dict_in_generate": True, **GREEDY}
    expected = model.generate(more, attention_mask=torch.ones_like(more), **{**shown.inputs, **kinds}, **asked).logits
    past = pipe.new_cache()
    pipe.generate(shown.ids[0], past_key_values=past, **shown.inputs, **GREEDY)
    other = picture(kind, columns=12)
    for between in (None, other):
        again = past.fork()
        if between is not None:
            pipe.generate(between.ids[0], **between.inputs, **GREEDY)
        got = pipe.generate(more[0], past_key_values=again, **kinds, **asked).output.logits
        torch.testing.assert_close(torch.stack(got), torch.stack(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", WITH_IMAGES)
def test_a_row_with_an_image_does_not_depend_on_its_neighbours(kind: str):
    model, shown = model_of(kind), [picture(kind), picture(kind, columns=12, text=31)]
    pipe = LazyPipeline(model, scorer=LastTokenAttention(), schedule=Constant(0.5, start=1))
    asked = {"output_logits": True, "return_dict_in_generate": True, **GREEDY}
    alone = [pipe.generate(one.ids[0], **one.inputs, **asked).output.logits for one in shown]
    width = max(one.ids.shape[1] for one in shown)
    inputs = {}
    for name in shown[0].inputs:
        values = [one.inputs[name] for one in shown]
        if name in KINDS:
            values = [torch.nn.functional.pad(value, (width - value.shape[1], 0)) for value in values]
        inputs[name] = torch.cat(values)
    together = pipe.generate([one.ids[0].tolist() for one in shown], **inputs, **asked)[0].output.logits
    for step, logits in enumerate(together):
        expected = torch.cat([alone[row][step] for row in (0, 1)])
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


def test_how_far_tokens_see_is_saved_with_a_cache_and_ends_where_it_is_cropped(tmp_path):
    model, shown = model_of("gemma3"), picture("gemma3")
    pipe = LazyPipeline(model, scorer=LastTokenAttention(), schedule=Constant(0.5, start=1))
    past = pipe.new_cache()
    pipe.generate(shown.ids[0], past_key_values=past, **shown.inputs, **GREEDY)
    expected = torch.cat([reach_of(shown.ids[0]), torch.arange(shown.ids.shape[1], past.columns)])
    for twin in (past, past.fork(), pipe.load_cache(past.save(tmp_path / "cache"))):
        assert torch.equal(twin.rows[0].ledger.reach, expected)
        twin.crop(12 - twin.columns)  # in the middle of the image
        assert torch.equal(twin.rows[0].ledger.reach, expected[:12].clamp(max=11))


def test_layers_that_see_different_tokens_behind_a_token_are_refused():
    model, ids = model_of("gemma3"), random_ids(1, 12) % 80 + 3
    pipe = LazyPipeline.from_preset("dense", model)
    masks = {"full_attention": Seen(), "sliding_attention": Seen(ahead=torch.ones(1, 12, dtype=torch.long))}
    message = r"in some layers than in others \(full_attention, sliding_attention\)"
    with torch.no_grad(), pipe.attached() as attached, pytest.raises(InputError, match=message):
        attached(ids, past_key_values=pipe.new_cache(), attention_mask=masks)


@pytest.mark.parametrize(("length", "runs"), [(WINDOW // 2, True), (2 * WINDOW, False)])
def test_a_prompt_whose_tokens_all_see_each_other(length: int, runs: bool):
    """One block; not where a window cuts it."""
    options = {"sliding_window": WINDOW, "query_pre_attn_scalar": 8, "head_dim": 8, "sliding_window_pattern": 2}
    config = AutoConfig.for_model("gemma3_text", **TEXT, **options, use_bidirectional_attention=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="sdpa").eval()
    pipe, ids = LazyPipeline.from_preset("dense", model), random_ids(1, length)
    with torch.no_grad(), pipe.attached() as attached:
        if runs:
            got = attached(ids, past_key_values=pipe.new_cache()).logits
        else:
            with pytest.raises(InputError, match="not all of a block up to its end"):
                attached(ids, past_key_values=pipe.new_cache())
    if runs:
        torch.testing.assert_close(got, model(ids).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", THREE_AXES)
def test_where_tokens_stand_is_saved_with_a_cache(kind: str, tmp_path):
    model, shown = model_of(kind), picture(kind)
    pipe = LazyPipeline(model, scorer=LastTokenAttention(), schedule=Constant(0.5, start=1))
    past = pipe.new_cache()
    pipe.generate(shown.ids[0], past_key_values=past, **shown.inputs, **GREEDY)
    place = past.rows[0].ledger.place
    assert place.shape == (past.columns, 3)
    assert not torch.equal(place[:, 0], place[:, 2])
    for twin in (past.fork(), pipe.load_cache(past.save(tmp_path / "cache"))):
        assert torch.equal(twin.rows[0].ledger.place, place)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_folder_is_loaded(kind: str, tmp_path):
    model, shown = model_of(kind), picture(kind)
    model.save_pretrained(tmp_path)
    word_tokenizer(["a", "b"]).save_pretrained(tmp_path)
    pipe = LazyPipeline.from_pretrained(tmp_path, preset="dense")
    assert type(pipe.model) is type(model)
    text = random_ids(1, 12) % 80 + 3
    assert pipe.generate(text[0], **GREEDY).token_ids == stock_reply(model, text)
    if kind in WITH_IMAGES:
        reply = pipe.generate(shown.ids[0], **shown.inputs, **GREEDY).token_ids
        assert reply == stock_reply(model, shown.ids, **shown.inputs)


REFUSED = {"qwen3_vl": "deepstack_visual_embeds"}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_image_that_a_causal_stack_cannot_run_is_refused(kind: str):
    model, shown = model_of(kind), picture(kind)
    pipe = LazyPipeline.from_preset("dense", model)
    past = pipe.new_cache()
    with pytest.raises(InputError, match=REFUSED[kind]):
        pipe.generate(shown.ids[0], past_key_values=past, **shown.inputs, **GREEDY)
    assert past.columns == 0
    text = random_ids(1, 12) % 80 + 3
    assert pipe.generate(text[0], **GREEDY).token_ids == stock_reply(model, text)


def test_token_types_of_text_are_not_refused():
    model, ids = model_of("gemma3"), random_ids(1, 24) % 80 + 3
    types = torch.zeros_like(ids)
    reply = LazyPipeline.from_preset("dense", model).generate(ids[0], token_type_ids=types, **GREEDY).token_ids
    assert reply == stock_reply(model, ids, token_type_ids=types)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_that_reads_images_is_left_as_found(kind: str):
    model = model_of(kind)
    decoder = model.get_decoder()
    before = (decoder.layers, decoder.config._attn_implementation, model.config.vision_config._attn_implementation)
    test_text_alone_is_the_model_itself_where_nothing_is_pruned(kind)
    after = (decoder.layers, decoder.config._attn_implementation, model.config.vision_config._attn_implementation)
    assert before == after
    modules = (model, decoder, decoder.rotary_emb)
    assert not any(module._forward_pre_hooks for module in modules)

"""Rows that choose adapters where the images of all rows are one sequence: each row gets its own, or an error."""

from __future__ import annotations

import inspect

import architectures as tiny
import pytest
import torch
import transformers as tf
from torch import nn

import pyfastpeft as fp

IMAGE, VIDEO = 60, 61  # the tokens
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_TEXT = tiny._LLAMA | {"rope_parameters": _ROPE, "bos_token_id": None, "eos_token_id": None}
_VISION = {"depth": 2, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
_HIDDEN = {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32}
_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": 62, "vision_end_token_id": 63}
MODELS = {
    "qwen2_vl": lambda: tf.Qwen2VLForConditionalGeneration(
        tf.Qwen2VLConfig(text_config=_TEXT, vision_config=_VISION | {"embed_dim": 16, "hidden_size": 32}, **_TOKENS)
    ),
    "qwen2_5_vl": lambda: tf.Qwen2_5_VLForConditionalGeneration(
        tf.Qwen2_5_VLConfig(
            text_config=_TEXT,
            vision_config=_VISION | _HIDDEN | {"window_size": 16, "fullatt_block_indexes": [1]},
            **_TOKENS,
        )
    ),
    "glm4v": lambda: tf.Glm4vForConditionalGeneration(
        tf.Glm4vConfig(
            text_config=_TEXT | {"rope_parameters": _ROPE | {"partial_rotary_factor": 1.0}},
            vision_config=_VISION | _HIDDEN | {"image_size": 16},
            **_TOKENS,
        )
    ),
}


def make(name: str, **targets: str) -> fp.PeftModel:
    """With LoRAs of these names on the layers that each has as its ``target_modules``."""
    model = None
    for adapter, target in targets.items():
        config = fp.LoraConfig(r=2, target_modules=target)
        if model is None:
            model = fp.get_peft_model(tiny.vary_vectors(MODELS[name]()), config, adapter)
        else:
            model.add_adapter(adapter, config)
    tiny.randomize(model)
    return model.eval()


def row(*grids: tuple[int, int, int], text: int = 12) -> dict[str, torch.Tensor]:
    """One row of ``text`` tokens beside its images."""
    blocks = [torch.tensor([62, *[IMAGE] * (t * h * w // 4), 63]) for t, h, w in grids]
    ids = torch.cat([torch.randint(2, 50, (text,)), *blocks])[None]
    pixels = torch.randn(sum(t * h * w for t, h, w in grids), 3 * 2 * 16)
    images = {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)} if grids else {}
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).int(),
        "attention_mask": torch.ones_like(ids),
    } | images


def batch_of(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    length = max(one["input_ids"].shape[1] for one in rows)
    ids = ("input_ids", "mm_token_type_ids", "attention_mask")
    padded = {k: [nn.functional.pad(one[k], (length - one[k].shape[1], 0)) for one in rows] for k in ids}
    images = {k: [one[k] for one in rows if k in one] for k in ("pixel_values", "image_grid_thw")}
    return {k: torch.cat(v) for k, v in (padded | images).items() if v}


def assert_each_as_alone(model: fp.PeftModel, rows: list[dict[str, torch.Tensor]], names: list) -> None:
    together = model(**batch_of(rows), adapter_names=names).logits
    for one, name, got in zip(rows, names, together, strict=True):
        alone = model(**one, adapter_names=[name]).logits[0]
        torch.testing.assert_close(got[-len(alone) :], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_rows_with_equal_shares_get_their_own_adapters(name):
    model = make(name, a="all-linear", b="all-linear")
    assert_each_as_alone(model, [row((1, 4, 4)), row((1, 4, 4), text=9)], ["a", "b"])
    # Not in equally many images.
    assert_each_as_alone(model, [row((1, 4, 8)), row((1, 4, 4), (1, 4, 4), text=9)], ["b", "__base__"])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_rows_with_unequal_shares_are_refused_where_they_choose_for_images(name):
    model = make(name, a="all-linear", b="all-linear", text=r".*language_model.*(q_proj|down_proj)")
    rows = [row((1, 4, 4)), row((1, 4, 8))]
    # The patches of all rows are as many as if the shares were equal, and as many as there are images.
    swapped = [row((1, 4, 4), (1, 4, 4)), row((1, 4, 8), (1, 4, 8))]
    for chosen in (rows, swapped, [row((1, 4, 4), (1, 4, 4)), row()]):
        for names in (["a", "b"], ["a", "__base__"], ["text", "b"]):
            for call in (model, model.generate):
                with pytest.raises(
                    ValueError, match=r"adapter_names has different adapters for the pixel_values .*'a', 'b'"
                ):
                    call(**batch_of(chosen), adapter_names=names)
        for names in (["a", "a"], ["text", "__base__"], [["a", "text"], "a"]):
            assert_each_as_alone(model, chosen, names)
    assert_each_as_alone(model, [row(), row(text=9)], ["a", "b"])


@torch.no_grad()
def test_shares_that_nothing_tells_are_refused():
    model = make("qwen2_vl", a="all-linear", b="all-linear")
    batch = batch_of([row((1, 4, 4)), row((1, 4, 4))])
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    with pytest.raises(ValueError, match="bring images alone, with equally many tokens each in input_ids"):
        model(inputs_embeds=embeds, **batch, adapter_names=["a", "b"])


@torch.no_grad()
def test_no_equal_shares_are_asked_for_where_they_do_not_help(monkeypatch):
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "head_dim": 8, "image_size": 16, "patch_size": 4}
    choices = {"vision_feature_select_strategy": "full", "vision_feature_layer": -1, "image_token_id": IMAGE}
    text = tiny._LLAMA | {"model_type": "mistral"}
    config = tf.LlavaConfig(text_config=text, vision_config=vision, **choices)
    monkeypatch.setitem(MODELS, "pixtral", lambda: tf.LlavaForConditionalGeneration(config))
    model = make("pixtral", a="all-linear", b="all-linear")
    ids = torch.tensor([[3] + [IMAGE] * 16 + [4, 5]] * 2)
    images = {"pixel_values": torch.randn(2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * 2)}
    model(ids, **images, adapter_names=["a", "a"])
    with pytest.raises(ValueError, match=r"\['a', 'b'\], all rows must use the same$"):
        model(ids, **images, adapter_names=["a", "b"])


_STRIPPED = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "hidden_size": 16}
_STRIPPED |= {"intermediate_size": 32, "num_hidden_layers": 2, "patch_size": 4}
STRIPPING = {
    "gemma4": lambda: tf.Gemma4ForConditionalGeneration(
        tf.Gemma4Config(
            text_config=tiny._LLAMA | {"head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 0},
            vision_config=_STRIPPED | {"pooling_kernel_size": 2, "position_embedding_size": 16},
            audio_config=None,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            **dict.fromkeys(("audio_token_id", "boi_token_id", "eoi_token_id", "boa_token_id", "eoa_token_index"), 62),
        )
    ),
    "molmo2": lambda: tf.Molmo2ForConditionalGeneration(
        tf.Molmo2Config(
            text_config=tiny._LLAMA | {"head_dim": 8, "additional_vocab_size": 16},
            vision_config=_STRIPPED | {"image_size": [16, 16], "num_position_embeddings": 16},
            adapter_config=_STRIPPED | {"text_hidden_size": 32, "vision_feature_layer": [-1]},
            image_patch_id=IMAGE,
        )
    ),
}
"""Models whose encoders see an image a row; the tokens of all images are one sequence behind them."""
POOLED_BY_IMAGE = "image_num_crops" in inspect.signature(tf.Molmo2Model.get_image_features).parameters
"""Whether Molmo 2's pooling counts an image's own patches, as from transformers 5.25 on, or all of the batch's."""


def stripped_row(name: str, *heights: int, text: int = 12) -> dict[str, torch.Tensor]:
    """One row of ``text`` tokens beside images of 4 patches' width and these heights, each in a frame of 16 patches."""
    blocks = [torch.tensor([62, *[IMAGE] * height, 63]) for height in heights]  # a token is 4 patches
    ids = torch.cat([torch.randint(2, 50, (text,)), *blocks])[None]
    given = {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int(), "attention_mask": torch.ones_like(ids)}
    given["pixel_values"] = torch.rand(len(heights), 16, 48)
    if name == "gemma4":
        at = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).view(16, 2)
        places = [torch.where(torch.arange(16)[:, None] < 4 * height, at, -1) for height in heights]
        return given | {"image_position_ids": torch.stack(places)}
    pooled = torch.tensor([[0, 1, 4, 5], [2, 3, 6, -1], [8, 9, 12, 13], [10, 11, 14, 15]])
    grids = torch.tensor([[height, 1, 0, 0] for height in heights])
    given["image_grids"] = grids
    if POOLED_BY_IMAGE:
        pooled = [pooled[:height] for height in heights]
        given["image_num_crops"] = torch.ones(len(heights), dtype=torch.long)
    else:
        pooled = [pooled[:height] + 16 * i * (pooled[:height] >= 0) for i, height in enumerate(heights)]
    return given | {"image_token_pooling": torch.cat(pooled)}


def stripped_batch(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    crops, batch = 0, batch_of([{k: v for k, v in one.items() if not k.startswith("image_")} for one in rows])
    others = {k: [one[k] for one in rows] for k in rows[0] if k.startswith("image_")}
    for i, pooled in enumerate(() if POOLED_BY_IMAGE else others.get("image_token_pooling", ())):
        others["image_token_pooling"][i] = pooled + 16 * crops * (pooled >= 0)
        crops += len(rows[i]["pixel_values"])
    return batch | {k: torch.cat(v) for k, v in others.items()}


@pytest.mark.parametrize("name", STRIPPING)
@torch.no_grad()
def test_rows_whose_image_tokens_are_packed_without_padding_get_their_own_adapters_or_an_error(name, monkeypatch):
    monkeypatch.setitem(MODELS, name, STRIPPING[name])
    model = make(name, a="all-linear", b="all-linear", text=r".*language_model.*(q_proj|down_proj)")

    def check(rows, names):
        together = model(**stripped_batch(rows), adapter_names=names).logits
        for one, adapter, got in zip(rows, names, together, strict=True):
            alone = model(**one, adapter_names=[adapter]).logits[0]
            torch.testing.assert_close(got[-len(alone) :], alone, rtol=1e-4, atol=1e-4)

    def make_row(*heights, text=12):
        return stripped_row(name, *heights, text=text)

    check([make_row(4), make_row(4, text=9)], ["a", "b"])
    check([make_row(2, 4), make_row(4, 2, text=9)], ["b", "__base__"])
    # Unequally many tokens, or images.
    for rows in ([make_row(4), make_row(2)], [make_row(4, 4), make_row(2, 2, 2, 2)]):
        for call in (model, model.generate):
            with pytest.raises(
                ValueError, match=r"adapter_names has different adapters for the pixel_values .*'a', 'b'"
            ):
                call(**stripped_batch(rows), adapter_names=["a", "b"])
        for names in (["a", "a"], ["text", "__base__"]):
            check(rows, names)

"""Rows that choose adapters where a layer's input begins with something else: an error, however much of it there is."""

from __future__ import annotations

import architectures as tiny
import pytest
import torch
import transformers as tf
from transformers.models.mask2former import modeling_mask2former

import pyfastpeft as fp

_SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
_TEXT = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
_IMAGES = _TEXT | {"image_size": 32, "patch_size": 8}
_DETR = {"encoder_layers": 1, "decoder_layers": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 6}
_DETR |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_labels": 3}


def _resnet():
    return tf.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 32, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def _dino():
    return tf.Dinov2Config(**_IMAGES, out_features=["stage1", "stage2"], reshape_hidden_states=False)


def _mask2former():
    return tf.Mask2FormerForUniversalSegmentation(
        tf.Mask2FormerConfig(
            backbone_config=_resnet(),
            **{"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 32},
            **{"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "dim_feedforward": 32},
            num_queries=6,
        )
    )


def _depth_pro():
    return tf.DepthProForDepthEstimation(
        tf.DepthProConfig(
            **{f"{part}_model_config": _dino() for part in ("image", "patch", "fov")},
            **{"patch_size": 32, "fusion_hidden_size": 8, "intermediate_hook_ids": [1, 0]},
            **{"intermediate_feature_dims": [8, 8], "scaled_images_feature_dims": [8, 8, 8]},
            scaled_images_ratios=[0.25, 0.5, 1],
        )
    )


MODELS = {
    "longformer": lambda: tf.LongformerModel(tf.LongformerConfig(**_TEXT, attention_window=4)),
    "led": lambda: tf.LEDModel(tf.LEDConfig(vocab_size=tiny.VOCAB, **_SEQ2SEQ, attention_window=4)),
    "xlnet": lambda: tf.XLNetModel(tf.XLNetConfig(vocab_size=tiny.VOCAB, d_model=32, n_layer=2, n_head=2, d_inner=32)),
    "fsmt": lambda: tf.FSMTModel(
        tf.FSMTConfig(langs=["en", "de"], src_vocab_size=tiny.VOCAB, tgt_vocab_size=tiny.VOCAB, **_SEQ2SEQ)
    ),
    "bros": lambda: tf.BrosModel(tf.BrosConfig(**_TEXT | {"hidden_size": 64})),
    "mlcd": lambda: tf.MLCDVisionModel(tf.MLCDVisionConfig(**_IMAGES)),
    "mask2former": _mask2former,
    "depth_pro": _depth_pro,
    "dab_detr": lambda: tf.DabDetrForObjectDetection(
        tf.DabDetrConfig(**_DETR, hidden_size=32, backbone_config=_resnet())
    ),
    "detr": lambda: tf.DetrForObjectDetection(
        tf.DetrConfig(**_DETR, d_model=32, backbone_config=_resnet(), auxiliary_loss=True)
    ),
    "higgs_audio": lambda: tf.HiggsAudioV2ForConditionalGeneration(
        tf.HiggsAudioV2Config(
            **_TEXT | {"vocab_size": tiny.VOCAB},
            **{"num_key_value_heads": 2, "head_dim": 16, "num_codebooks": 2, "codebook_size": 16},
            **{"audio_token_id": 60, "audio_delay_token_id": 61, "audio_bos_token_id": 62},
            **{"audio_stream_bos_id": 14, "audio_stream_eos_id": 15, "pad_token_id": 0, "eos_token_id": 2},
        )
    ),
    "t5": lambda: tf.T5Model(
        tf.T5Config(vocab_size=tiny.VOCAB, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2)
    ),
}


@pytest.fixture
def make(monkeypatch):
    """A model with LoRAs a and b on the layers of ``target_modules``."""
    # It asks for scipy, for the sake of its loss.
    monkeypatch.setattr(modeling_mask2former, "requires_backends", lambda *_: None)

    def with_adapters(name, target_modules, **kwargs):
        config = fp.LoraConfig(r=2, target_modules=target_modules, init_lora_weights=False, **kwargs)
        model = fp.get_peft_model(tiny.vary_vectors(MODELS[name]()), config, "a")
        model.add_adapter("b", config)
        return model.eval()

    return with_adapters


def batch_for(name):
    """Four rows, of as many positions as may be a multiple of that."""
    if name == "depth_pro":
        return {"pixel_values": torch.randn(4, 3, 128, 128)}
    if "detr" in name or name in ("mask2former", "mlcd"):
        return {"pixel_values": torch.randn(4, 3, 64, 64) if name != "mlcd" else torch.randn(4, 3, 32, 32)}
    ids = torch.randint(3, 60, (4, 8))
    batch = {"input_ids": ids}
    if name == "higgs_audio":
        sounds = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 0]]).bool()
        ids[:, 2:5][sounds] = 60
        batch |= {"audio_input_ids": torch.randint(0, 14, (4, 3, 2)), "audio_input_ids_mask": sounds}
    if name in ("led", "fsmt", "t5"):
        batch["decoder_input_ids"] = ids
    return batch | ({"bbox": torch.rand(4, 8, 4)} if name == "bros" else {})


def output(model, batch, **kwargs):
    """The output's first tensor."""
    return next(iter(model(**batch, **kwargs).values()))


def assert_each_as_alone(model, batch):
    names = ["a", "b", "b", "a"]
    got = output(model, batch, adapter_names=names)
    for name in "ab":
        model.set_adapter(name)
        alone = output(model, batch)
        mine = [i for i, n in enumerate(names) if n == name]
        assert tiny.relative(got[mine], alone[mine]) < 1e-5


def assert_refused(model, batch, path, **kwargs):
    said = rf"has \['a', 'b'\] for some rows and not for others; '.*{path}' is called with what does not begin with the"
    with pytest.raises(ValueError, match=said):
        model(**batch, adapter_names=["a", "b", "b", "a"], **kwargs)
    alike = output(model, batch, adapter_names=["b"] * 4)
    model.set_adapter("b")
    assert tiny.relative(alike, output(model, batch)) < 1e-5


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("longformer", "query"),
        ("led", "longformer_self_attn.value"),
        ("xlnet", "word_embedding"),
        ("xlnet", "layer_1"),
        ("fsmt", "fc1"),
        ("bros", "bbox_projection"),
        ("mlcd", "out_proj"),
        ("mask2former", "decoder.layers.0.fc1"),
        ("depth_pro", "patch_encoder.model.encoder.layer.0.attention.q_proj"),
        ("dab_detr", "bbox_predictor.layers.0"),
        ("higgs_audio", "layers.0.mlp.gate_proj"),
        ("higgs_audio", "layers.0.audio_mlp.gate_proj"),
        ("t5", "relative_attention_bias"),
    ],
)
@torch.no_grad()
def test_rows_do_not_choose_where_something_else_comes_first(make, name, target):
    assert_refused(make(name, [target]), batch_for(name), target)


@torch.no_grad()
def test_rows_do_not_choose_there_in_a_bottleneck_a_trained_copy_or_trained_tokens(make):
    batch, base = batch_for("xlnet"), tiny.vary_vectors(MODELS["xlnet"]())
    kinds = {
        "layer.0.ff.layer_2": fp.BottleneckConfig(target_modules=["layer_2"]),
        "layer.0.ff.layer_1": fp.LoraConfig(target_modules=["layer_2"], modules_to_save=["layer_1"]),
        "word_embedding": fp.LoraConfig(target_modules=["layer_2"], trainable_token_indices={"word_embedding": [5, 6]}),
    }
    for path, config in kinds.items():
        model = fp.get_peft_model(base, config, "a")
        model.add_adapter("b", config)
        assert_refused(model.eval(), batch, path)
        model.unload()


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("longformer", r".*(intermediate|output)\.dense"),
        ("fsmt", ["embed_tokens"]),
        ("mlcd", ["q_proj", "fc1"]),
        ("mask2former", ["q_proj", "v_proj"]),
        ("depth_pro", r".*image_encoder.*q_proj"),
        ("detr", ["q_proj", "class_labels_classifier"]),
    ],
)
@torch.no_grad()
def test_rows_choose_in_the_layers_beside_them(make, name, target):
    assert_each_as_alone(make(name, target), batch_for(name))


def test_rows_do_not_choose_in_a_head_that_sees_several_decoder_layers(make, monkeypatch):
    model, batch = make("detr", ["class_labels_classifier"]), batch_for("detr")
    monkeypatch.setattr(model.get_base_model(), "loss_function", lambda *_: (torch.zeros(()), {}, []))
    model(**batch, labels=[], adapter_names=["a"] * 4)
    with pytest.raises(ValueError, match="'class_labels_classifier' is called with what does not begin with the rows"):
        model(**batch, labels=[], adapter_names=["a", "b", "b", "a"])


@torch.no_grad()
def test_rows_that_choose_among_adapters_elsewhere_are_served(make):
    model, batch = make("longformer", ["query"]), batch_for("longformer")
    model.add_adapter("c", fp.LoraConfig(r=2, target_modules=["intermediate.dense"], init_lora_weights=False))
    got = output(model, batch, adapter_names=[["a", "c"], "a", "a", "a"])
    model.set_adapter("a")
    alone = output(model, batch)
    assert tiny.relative(got[1:], alone[1:]) < 1e-5 and tiny.relative(got[0], alone[0]) > 1e-3


_SPEECH = _TEXT | {"num_key_value_heads": 2, "head_dim": 16}
_CODES = {"vocab_size": tiny.VOCAB + 2, "num_channels": 2, "bos_token_id": 63, "eos_token_id": 64, "pad_token_id": 65}
_CROSS = {"cross_num_attention_heads": 2, "cross_num_key_value_heads": 2, "cross_head_dim": 16, "cross_hidden_size": 32}


def _musicgen(kind="Musicgen", **kwargs):
    decoder = {"vocab_size": 32, "num_hidden_layers": 1, "ffn_dim": 32, "num_attention_heads": 2, "hidden_size": 32}
    audio = {"hidden_size": 8, "num_filters": 4, "upsampling_ratios": [4, 2], "codebook_size": 32}
    config = getattr(tf, f"{kind}Config")(
        text_encoder=tf.T5Config(vocab_size=tiny.VOCAB, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2),
        audio_encoder=tf.EncodecConfig(**audio, target_bandwidths=[12.0], sampling_rate=1000),
        decoder=decoder | {"pad_token_id": 32, "bos_token_id": 32, "max_position_embeddings": 64},
        **kwargs,
    )
    return getattr(tf, f"{kind}ForConditionalGeneration")(config)


def _dia():
    decoder = _SPEECH | _CODES | _CROSS
    config = tf.DiaConfig(encoder_config=_SPEECH, decoder_config=decoder, delay_pattern=[0, 1])
    return tf.DiaForConditionalGeneration(config)


GUIDED = {
    "musicgen": _musicgen,
    "musicgen_melody": lambda: _musicgen("MusicgenMelody", num_chroma=4),
    "dia": _dia,
}


def with_two(base):
    """``base`` with LoRAs a and b."""
    config = fp.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = fp.get_peft_model(tiny.vary_vectors(base), config, "a")
    model.add_adapter("b", config)
    return model.eval()


@pytest.mark.parametrize("name", GUIDED)
@torch.no_grad()
def test_rows_do_not_choose_where_guidance_runs_them_twice_in_one_batch(name):
    model, ids = with_two(GUIDED[name]()), torch.randint(3, 60, (2, 6))
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": -1}
    model.generation_config.guidance_scale = 1.0
    for call in (
        lambda **kwargs: model.generate(ids, guidance_scale=3.0, **options, **kwargs),
        lambda **kwargs: model.generate(ids, tf.GenerationConfig(guidance_scale=3.0, **options), **kwargs),
    ):
        with pytest.raises(ValueError, match=r"\['a', 'b'\] for some rows and not for others, and guidance_scale is 3"):
            call(adapter_names=["a", "b"])
    model.generation_config.guidance_scale = 3.0
    with pytest.raises(ValueError, match=r"guidance_scale is 3\.0"):
        model.generate(ids, adapter_names=["a", "b"], **options)
    alike = model.generate(ids, adapter_names=["b", "b"], **options)
    model.set_adapter("b")
    torch.testing.assert_close(alike, model.generate(ids, **options))
    mixed = model.generate(ids, adapter_names=["a", "b"], guidance_scale=1.0, **options)
    torch.testing.assert_close(mixed[1], model.generate(ids, guidance_scale=1.0, **options)[1])


@torch.no_grad()
def test_rows_do_not_choose_where_whisper_goes_on_with_those_that_are_not_done():
    """Two beams of the second row, by itself, were taken for one of each, where the decoder alone has adapters."""
    config = tf.WhisperConfig(
        vocab_size=tiny.VOCAB,
        **_SEQ2SEQ | {"num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 32},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3},
    )
    base = tiny.vary_vectors(tf.WhisperForConditionalGeneration(config))
    base.generation_config.no_timestamps_token_id, base.generation_config.is_multilingual = tiny.VOCAB - 1, False
    base.generation_config.suppress_tokens, base.generation_config.begin_suppress_tokens = [0, 2], None  # all rows last
    lora = fp.LoraConfig(r=2, target_modules=r".*decoder.*(q_proj|v_proj)", init_lora_weights=False)
    model = fp.get_peft_model(base, lora, "a").eval()
    model.add_adapter("b", lora)
    sounds, options = torch.randn(2, 4, 40), {"max_new_tokens": 6, "num_beams": 2}
    window, mask = sounds[..., :16], torch.ones(2, 40, dtype=torch.int64)
    mask[0, 16:] = 0
    long = options | {"attention_mask": mask, "return_timestamps": True, "adapter_names": ["a", "b"]}
    said = r"\['a', 'b'\] for some rows and not for others, and input_features has 40 frames, and a window 16; a Whi"
    with pytest.raises(ValueError, match=said):
        model.generate(sounds, **long)
    with pytest.raises(ValueError, match=said):
        model.generate(input_features=sounds, **long)
    several = options | {"temperature": (0.0, 0.0), "compression_ratio_threshold": 0.1, "logprob_threshold": -0.1}
    with pytest.raises(ValueError, match=r"temperature is \(0\.0, 0\.0\)"):
        model.generate(window, adapter_names=["a", "b"], **several)
    with pytest.raises(ValueError, match="return_timestamps is True"):
        model.generate(window, adapter_names=["a", "b"], return_timestamps=True, **options)
    alike = model.generate(window, adapter_names=["b", "b"], **several)
    mixed = model.generate(window, adapter_names=["a", "b"], temperature=0.0, **options)
    model.set_adapter("b")
    assert torch.equal(alike, model.generate(window, **several))
    alone = model.generate(window, temperature=0.0, **options)
    length = min(alone.shape[1], mixed.shape[1])
    assert torch.equal(mixed[1, :length], alone[1, :length])


@torch.no_grad()
def test_rows_do_not_choose_for_images_that_janus_generates():
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    codes = {
        "embed_dim": 8,
        "num_embeddings": 32,
        "latent_channels": 8,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
    }
    config = tf.JanusConfig(
        text_config=tf.LlamaConfig(**_TEXT),
        vision_config=vision | {"projection_dim": 32, "num_image_tokens": 4},
        vq_config=codes | {"num_res_blocks": 1, "projection_dim": 32, "image_token_embed_dim": 32, "num_patches": 2},
        image_token_id=60,
    )
    model, ids = with_two(tf.JanusForConditionalGeneration(config)), torch.randint(3, 60, (2, 6))
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": -1}
    with pytest.raises(ValueError, match=r"\['a', 'b'\] for some rows .* generation_mode is 'image'"):
        model.generate(ids, generation_mode="image", adapter_names=["a", "b"], **options)
    mixed = model.generate(ids, adapter_names=["a", "b"], guidance_scale=3.0, **options)
    model.set_adapter("b")
    assert torch.equal(mixed[1], model.generate(ids, **options)[1])


@torch.no_grad()
def test_rows_choose_where_a_text_model_generates_with_guidance():
    model, ids = with_two(tiny.make()), torch.randint(3, 60, (2, 6))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "guidance_scale": 2.0}
    options |= {"output_logits": True, **tiny.WITH_SCORES}
    mixed = model.generate(ids, adapter_names=["a", "b"], **options)
    for row, name in enumerate("ab"):
        model.set_adapter(name)
        alone = model.generate(ids, **options)
        for got, expected in zip(mixed.scores, alone.scores, strict=True):
            assert tiny.relative(got[row], expected[row]) < 1e-5

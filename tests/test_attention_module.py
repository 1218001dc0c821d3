"""nn.Attention: the layer of Llama, without transformers."""

import pytest
import torch
import transformers as tf

import pyfastpeft as fp
from pyfastpeft.adapters import Prefix


def pair(**changes):
    """One layer of transformers' Llama, and ours with its weights."""
    config = tf.LlamaConfig(
        hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16, attn_implementation="eager"
    )
    llama = tf.models.llama.modeling_llama.LlamaAttention(config, 0)
    ours = fp.nn.Attention(48, 4, 2, head_dim=16, **changes)
    ours.load_state_dict(llama.state_dict())
    rotary = tf.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    return llama, ours, lambda x, start=0: rotary(x, torch.arange(start, start + x.shape[1])[None])


def causal_mask(mask, tokens):
    batch, keys = mask.shape
    seen = torch.arange(keys) <= torch.arange(keys - tokens, keys)[:, None]
    seen = seen & mask[:, None, None].bool()
    return torch.zeros(batch, 1, tokens, keys).masked_fill(~seen, torch.finfo(torch.float32).min)


def test_forward_and_gradients_are_those_of_transformers_layer():
    llama, ours, rotary = pair()
    x = torch.randn(3, 7, 48)
    mask = torch.ones(3, 7)
    mask[1, :3] = 0
    cotangent = torch.randn(3, 7, 48) * mask[..., None]
    results = []
    for layer in (llama, ours):
        own = x.clone().requires_grad_()
        if layer is llama:
            y, _ = layer(own, position_embeddings=rotary(x), attention_mask=causal_mask(mask, 7))
        else:
            y, _ = layer(own, rotary(x), mask=mask.long())
        (y * cotangent).sum().backward()
        results.append([(y * mask[..., None]), own.grad, *(p.grad for p in layer.parameters())])
    for expected, got in zip(*results, strict=True):
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_past_keys_and_values_give_what_one_call_gives():
    _, ours, rotary = pair()
    x = torch.randn(2, 9, 48)
    with torch.no_grad():
        expected, (k, v) = ours(x, rotary(x))
        past, parts, start = None, [], 0
        for part in x.split([4, 1, 3, 1], 1):
            y, past = ours(part, rotary(part, start), past)
            parts.append(y)
            start += part.shape[1]
    assert torch.allclose(torch.cat(parts, 1), expected, atol=1e-5)
    assert torch.allclose(past[0], k, atol=1e-6) and torch.allclose(past[1], v, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 4])
def test_a_prefix_is_what_past_keys_would_be(causal, window):
    _, ours, rotary = pair(causal=causal, window=window)
    x = torch.randn(3, 6, 48)
    k, v = torch.randn(2, 2, 5, 16)
    with torch.no_grad():
        past = (k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1))
        expected, _ = ours(x, rotary(x, 5), past)
        got, (new, _) = ours(x, rotary(x, 5), prefix=(k, v))
        rows, _ = ours(x, rotary(x, 5), prefix=Prefix(k[None], v[None], torch.tensor([0, -1, 0])))
        none, _ = ours(x, rotary(x, 5))
    assert new.shape == (3, 2, 6, 16)
    assert torch.allclose(got, expected, atol=1e-5)
    assert torch.allclose(rows[::2], expected[::2], atol=1e-5) and torch.allclose(rows[1], none[1], atol=1e-5)


def test_projections_may_be_4_bit():
    _, exact, rotary = pair()
    _, ours, _ = pair()
    for name, layer in list(ours.named_children()):
        setattr(ours, name, fp.nn.Linear4bit.from_linear(layer))
        getattr(exact, name).weight.data = getattr(ours, name).dequantize()
    x = torch.randn(2, 5, 48)
    assert torch.allclose(ours(x, rotary(x))[0], exact(x, rotary(x))[0], atol=1e-5)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ((32, 4, 3), "num_kv_heads is 3; it must divide num_heads, 4"),
        ((30, 4), "num_heads is 4; without a head_dim it must divide hidden_size, 30"),
        ((32, 0), "num_heads is 0; it must be an integer of at least 1"),
        ((32, 4, 2, 0), "head_dim is 0; it must be an integer of at least 1"),
        ((32, 4, 2, 8, False, True, 0), "window is 0; it must be an integer of at least 1"),
        ((32, 4, 2, 8, False, True, 1.5), "window is 1.5; it must be an integer of at least 1"),
    ],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        fp.nn.Attention(*sizes)
    with pytest.raises(TypeError, match="causal is None; it must be True or False"):
        fp.nn.Attention(32, 4, causal=None)
    odd, x = fp.nn.Attention(32, 4, head_dim=7), torch.ones(1, 3, 32)
    assert odd(x)[0].shape == x.shape
    with pytest.raises(ValueError, match="head_dim is 7; with rotary it must be even"):
        odd(x, (torch.ones(1, 3, 7), torch.ones(1, 3, 7)))


def test_no_tokens_and_keys_and_values_in_one_tensor():
    layer, prefix = fp.nn.Attention(48, 6, 2), torch.randn(2, 2, 5, 8)
    out, (keys, values) = layer(torch.randn(3, 0, 48), prefix=prefix)
    assert out.shape == (3, 0, 48) and keys.shape == values.shape == (3, 2, 0, 8)
    x = torch.randn(3, 4, 48)
    assert torch.equal(layer(x, prefix=prefix)[0], layer(x, prefix=tuple(prefix))[0])
    assert torch.equal(layer(x, prefix=prefix)[0], layer(x, prefix=iter(prefix))[0])
    with pytest.raises(ValueError, match=r"x has shape \(4, 48\); it must be \[batch, tokens, hidden_size\]"):
        layer(x[0])


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"x": None}, TypeError, "x is a NoneType; it must be a tensor"),
        ({"x": torch.ones(1, 2, 47)}, ValueError, r"x has shape \(1, 2, 47\); .*hidden_size = 48"),
        ({"x": torch.ones(1, 2, 48).double()}, TypeError, "x has dtype torch.float64; it must be .*torch.float32"),
        ({"rotary": 3}, TypeError, "rotary is a int; it must be a pair of tensors, cos and sin"),
        ({"rotary": torch.ones(3, 2, 8)}, TypeError, "rotary is a Tensor; it must be a pair of tensors, cos and sin"),
        ({"rotary": (1, 2)}, TypeError, "cos is a int; it must be a tensor"),
        ({"prefix": 3}, TypeError, "prefix is a int; it must be a pair of tensors, keys and values"),
        ({"prefix": ()}, ValueError, "prefix holds 0 parts; it must hold keys and values, and may hold an index"),
        ({"prefix": [None] * 5}, ValueError, "prefix holds 5 parts; it must hold keys and values"),
        ({"prefix": torch.tensor(1.0)}, TypeError, "prefix is a Tensor; it must be a pair of tensors, keys and values"),
        ({"past": torch.tensor(1.0)}, TypeError, "past is a Tensor; it must be a pair of tensors, keys and values"),
        ({"past": (1, 2)}, TypeError, "keys of past is a int; it must be a tensor"),
    ],
)
def test_arguments_of_another_kind_are_named(change, kind, message):
    with pytest.raises(kind, match=message):
        fp.nn.Attention(48, 6, 2)(**({"x": torch.ones(1, 2, 48)} | change))


@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (3, 1, 5, 8), (2, 2, 5, 8), (2, 5, 8)])
def test_a_past_of_another_shape_is_named(shape):
    layer, x, right, wrong = (
        fp.nn.Attention(48, 6, 2),
        torch.randn(3, 4, 48),
        torch.randn(3, 2, 5, 8),
        torch.ones(shape),
    )
    for name, past in (("keys", (wrong, right)), ("values", (right, wrong))):
        with pytest.raises(ValueError, match=rf"past has {name} of shape .*; it must be \[3, 2, past, 8\]"):
            layer(x, past=past)

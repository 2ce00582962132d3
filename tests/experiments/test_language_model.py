"""The language model's network, its sizes and its loss."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.tasks import language_model as config
from experiments.tasks import language_model as task
from experiments.tasks.language_model import loss, model

SIZES = model.Sizes(
    layers=2, width=16, heads=4, kv_heads=2, mlp=24, vocab_size=40, tied=False,
    compute_dtype=jnp.dtype('float32'),
)  # fmt: skip
END = 7


@functools.cache
def parameters(sizes):
    """With scales that differ, so that they show."""
    params = jax.jit(functools.partial(model.init, sizes))(jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: np.float32(x + 0.1 * rng.normal(size=x.shape)), params)


@functools.cache
def caller(sizes):
    return jax.jit(model.forward(sizes))


def changed(**changes):
    return dataclasses.replace(SIZES, **changes)


def some_tokens(rows=2, length=12, seed=0):
    return np.random.default_rng(seed).integers(8, 40, size=(rows, length))


# Network.


def oracle_logits(sizes, params, tokens):
    """One row, in float64 NumPy, place by place."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    documents = np.cumsum(tokens == sizes.end) if sizes.end is not None else 0 * tokens
    half = sizes.head_dim // 2

    def norm(x, scale):
        return x / np.sqrt((x**2).mean() + 1e-6) * scale

    def turned(head, place):
        pairs = head[:half] + 1j * head[half:]
        pairs = pairs * np.exp(1j * place * sizes.rotary_base ** (-np.arange(half) / half))
        return np.concatenate([pairs.real, pairs.imag])

    xs = [p['embedding'][token] for token in tokens]
    for i in range(sizes.layers):
        own = jax.tree.map(lambda x, i=i: x[i], p['layers'])
        a, m = own['attention'], own['mlp']
        ys = [norm(x, a['scale']) for x in xs]
        added = [0 * x for x in xs]
        for n in range(sizes.heads):
            k = n * sizes.kv_heads // sizes.heads
            q, key, value = (
                [y @ a[name][:, head] for y in ys]
                for name, head in (('query', n), ('key', k), ('value', k))
            )
            if sizes.qk_norm:
                q = [norm(x, a['query_scale']) for x in q]
                key = [norm(x, a['key_scale']) for x in key]
            for t in range(len(tokens)):
                seen = [s for s in range(t + 1) if documents[s] == documents[t]]
                scores = [turned(q[t], t) @ turned(key[s], s) for s in seen]
                weights = np.exp(np.array(scores) / np.sqrt(sizes.head_dim))
                mixed = sum(w * value[s] for w, s in zip(weights, seen, strict=True))
                added[t] = added[t] + mixed / weights.sum() @ a['out'][n]
        xs = [x + y for x, y in zip(xs, added, strict=True)]
        for t, x in enumerate(xs):
            y = norm(x, m['scale'])
            gate = y @ m['gate']
            xs[t] = x + (gate / (1 + np.exp(-gate)) * (y @ m['up'])) @ m['down']
    kernel = p['embedding'].T if sizes.tied else p['output']
    return np.array([norm(x, p['final_scale']) @ kernel for x in xs])


@pytest.mark.parametrize(
    'changes',
    [
        {},
        dict(tied=True, kv_heads=4),
        dict(qk_norm=False, kv_heads=1),
        dict(end=END, rotary_base=100.0),
    ],
)
def test_logits_against_numpy(changes):
    sizes = changed(**changes)
    tokens = some_tokens()
    tokens[0, [3, 4, 8]] = END
    params = parameters(sizes)
    found = caller(sizes)(params, tokens)
    assert (found.shape, found.dtype) == ((2, 12, 40), 'float32')
    for row in range(2):
        expected = oracle_logits(sizes, params, tokens[row])
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-4)


def test_rotary_positions_are_relative(rng):
    """Products hang on the distance alone; lengths stay, and the first place is not turned."""
    turns = model.rotation(9, 8, 100.0)
    q, k = np.float32(rng.normal(size=(2, 8)))
    turned_q, turned_k = (
        np.asarray(model.rotate(jnp.broadcast_to(x, (1, 9, 1, 8)), turns))[0, :, 0] for x in (q, k)
    )
    products = turned_q @ turned_k.T
    for distance in range(-8, 9):
        own = np.diagonal(products, distance)
        np.testing.assert_allclose(own, own[0], rtol=1e-4, atol=1e-5)
    assert np.ptp(products[0]) > 0.1
    np.testing.assert_allclose(np.linalg.norm(turned_q, axis=1), np.linalg.norm(q), rtol=1e-5)
    np.testing.assert_array_equal(turned_q[0], q)


def test_later_tokens_are_not_seen():
    params, tokens = parameters(SIZES), some_tokens(1)
    other = tokens.copy()
    other[0, 7] = 39 if tokens[0, 7] != 39 else 38
    first, second = (caller(SIZES)(params, x)[0] for x in (tokens, other))
    np.testing.assert_array_equal(first[:7], second[:7])
    assert np.all(np.abs(first[7:] - second[7:]).max(axis=-1) > 1e-4)


def test_documents_of_a_row_are_as_alone():
    """Places do not start again with a document: rotary positions are relative."""
    sizes = changed(end=END)
    params, tokens = parameters(sizes), some_tokens(1)
    tokens[0, [0, 5]] = END
    together = caller(sizes)(params, tokens)[0]
    for part in (slice(0, 5), slice(5, 12)):
        alone = caller(sizes)(params, tokens[:, part])[0]
        np.testing.assert_allclose(together[part], alone, rtol=1e-4, atol=1e-5)
    without = caller(SIZES)(params, tokens)[0]
    assert np.abs(without[5:] - together[5:]).max() > 0.01


def unrolled(sizes, params, tokens):
    """Without a scan: each layer merged and called by itself."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: model.Layer(sizes, nnx.Rngs(0))))
    x = params['embedding'][tokens]
    turns = model.rotation(tokens.shape[1], sizes.head_dim, sizes.rotary_base)
    for i in range(sizes.layers):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], params['layers'])
        x = nnx.merge(graphdef, own)(x, turns, None)
    norm = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * params['final_scale']
    return norm @ params['output']


def gradient(call, params, tokens):
    def mean_loss(params):
        return loss.training_loss(call(params, tokens[:, :-1]), tokens[:, 1:], 0.0)

    return jax.jit(jax.grad(mean_loss))(params)


def assert_same(found, expected, rtol=1e-4, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), found, expected)


def test_scan_is_the_layers_one_by_one():
    params, tokens = parameters(SIZES), some_tokens()
    alone = functools.partial(unrolled, SIZES)
    assert_same(caller(SIZES)(params, tokens), alone(params, tokens))
    found = gradient(model.forward(SIZES), params, tokens)
    assert_same(found, gradient(alone, params, tokens))


def test_rematerialisation_changes_no_gradient():
    """'full' computes all products of a layer again, 'dots' those of the attention."""
    params, tokens = parameters(SIZES), some_tokens()
    found, products = {}, {}
    for remat in model.REMAT:
        forward = model.forward(changed(remat=remat))
        found[remat] = gradient(forward, params, tokens)
        text = jax.make_jaxpr(functools.partial(gradient, forward))(params, tokens)
        products[remat] = str(text).count('dot_general')
    assert_same(found['full'], found['none'])
    assert_same(found['dots'], found['none'])
    assert products['none'] < products['dots'] < products['full']


def test_bfloat16_arithmetic_keeps_float32_parameters():
    tokens, found = some_tokens(), {}
    for dtype in ('float32', 'bfloat16'):
        sizes = changed(compute_dtype=jnp.dtype(dtype))
        params = parameters(sizes)
        grads = gradient(model.forward(sizes), params, tokens)
        assert {x.dtype.name for x in jax.tree.leaves((params, grads))} == {'float32'}
        found[dtype] = caller(sizes)(params, tokens)
        assert found[dtype].dtype == 'float32'
        assert ('bf16' in str(jax.make_jaxpr(caller(sizes))(params, tokens))) == (
            dtype == 'bfloat16'
        )
    assert 1e-3 < np.abs(found['bfloat16'] - found['float32']).max() < 0.2
    low = jax.eval_shape(lambda: model.init(changed(param_dtype='bfloat16'), jax.random.key(0)))
    assert {x.dtype.name for x in jax.tree.leaves(low)} == {'bfloat16'}


@pytest.mark.parametrize('tied', [True, False])
def test_first_loss_is_that_of_knowing_nothing(tied):
    """About ln V + 1/2, and no token is said again, whatever the width."""
    sizes = changed(width=256, heads=4, mlp=64, vocab_size=512, tied=tied)
    params = jax.jit(functools.partial(model.init, sizes))(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(512, size=(4, 33))
    logits = caller(sizes)(params, tokens[:, :-1])
    found = loss.training_loss(logits, tokens[:, 1:], 0.0)
    assert abs(float(found) - math.log(512) - 0.5) < 0.3


def test_attention_s_implementation(monkeypatch):
    """CuDNN's where it is there and takes the heads and the dtype, or where it is asked for."""
    half = jnp.dtype('bfloat16')
    chosen = model._implementation
    assert chosen(changed(compute_dtype=half, width=64)) == 'xla'
    assert chosen(changed(attention='cudnn')) == 'cudnn'

    def device(capability):
        gpu = types.SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, 'devices', lambda: [gpu])

    for capability in ('7.5', 'gfx942'):
        device(capability)
        assert chosen(changed(compute_dtype=half, width=64)) == 'xla'
        assert chosen(changed(attention='cudnn')) == 'cudnn'
    for capability in ('12.0', '8.0'):
        device(capability)
        assert chosen(changed(compute_dtype=half, width=64)) == 'cudnn'
    assert chosen(changed(compute_dtype=half, width=64)) == 'cudnn'
    assert chosen(changed(compute_dtype=half, width=64, attention='xla')) == 'xla'
    assert chosen(changed(width=64)) == 'xla'
    assert chosen(changed(compute_dtype=half, width=4 * 256)) == 'xla'


# Sizes.

COUNTS = {
    'tiny': 131_456,
    'small': 24_648_960,
    'base': 124_276_992,
    'large': 341_889_024,
    '1b': 1_006_740_992,
}
NAMED = {'small': 25e6, 'base': 125e6, 'large': 350e6, '1b': 1e9}


def of(name, **changes):
    sizes = task.sizes(config.get_config(name))
    return dataclasses.replace(sizes, **changes)


def test_every_size_is_counted():
    assert list(COUNTS) == list(config.SIZES)
    with pytest.raises(ValueError, match=r"sizes of the language model are .*'1b'.*, got '2b'"):
        config.get_config('2b')


@pytest.mark.parametrize('name', COUNTS)
def test_parameters_and_flops(name):
    """By hand from the config; operations as PaLM's appendix B counts them."""
    c, shapes = config.get_config(name), model.shapes(of(name))
    assert {x.dtype.name for x in jax.tree.leaves(shapes)} == {'float32'}
    count = sum(x.size for x in jax.tree.leaves(shapes))
    assert count == COUNTS[name]
    assert abs(count / NAMED.get(name, count) - 1) < 0.03
    head = c.width // c.heads
    kernels = c.layers * (4 * c.width * c.width + 3 * c.width * c.mlp)
    scales = c.layers * (2 * c.width + 2 * head) + c.width
    vocabulary = c.vocab_size * c.width
    assert count == kernels + scales + vocabulary * (1 if c.tied else 2)
    flops = 6 * (kernels + vocabulary) + 12 * c.layers * c.width * c.length
    assert model.flops_per_token(of(name), c.length) == flops


def test_options_are_parameters_or_not():
    few = model.shapes(of('tiny', qk_norm=False, kv_heads=2))
    assert set(few['layers']['attention']) == {'scale', 'query', 'key', 'value', 'out'}
    assert few['layers']['attention']['key'].shape == (2, 64, 2, 16)
    assert 'output' not in few
    assert model.shapes(of('tiny', tied=False))['output'].shape == (64, 384)
    fewer = 2 * 2 * (2 * 64 * 16 + 16)
    assert sum(x.size for x in jax.tree.leaves(few)) == COUNTS['tiny'] - fewer
    flops = model.flops_per_token(of('tiny'), 64) - 6 * 2 * 2 * (2 * 64 * 16)
    assert model.flops_per_token(of('tiny', kv_heads=2), 64) == flops


# Loss and metrics.


def test_losses_against_numpy(rng):
    logits = np.float32(3 * rng.normal(size=(2, 3, 5)))
    targets, weights = rng.integers(5, size=(2, 3)), np.float32([1, 0])
    num_bytes = np.array([1, 0, 3, 1, 2], np.int32)
    exact = np.float64(logits)
    log_z = np.log(np.exp(exact).sum(-1))
    nats = log_z - np.take_along_axis(exact, targets[..., None], -1)[..., 0]
    plain, with_z = (float(loss.training_loss(logits, targets, z)) for z in (0.0, 0.01))
    assert plain == pytest.approx(nats.mean(), rel=1e-5)
    assert with_z == pytest.approx(nats.mean() + 0.01 * (log_z**2).mean(), rel=1e-5)
    summed = loss.sums(logits, targets, weights, jnp.asarray(num_bytes))
    found = {name: float(value) for name, value in loss.metrics(summed).items()}
    assert found['loss'] == pytest.approx(nats[0].mean(), rel=1e-5)
    assert found['perplexity'] == pytest.approx(np.exp(nats[0].mean()), rel=1e-5)
    bits = nats[0].sum() / np.log(2) / num_bytes[targets[0]].sum()
    assert found['bits_per_byte'] == pytest.approx(bits, rel=1e-5)
    assert found['squared_log_z'] == pytest.approx((log_z[0] ** 2).mean(), rel=1e-5)


@pytest.mark.parametrize(
    ('decay', 'middle'), [('cosine', 0.25 + 0.75 / 2), ('linear', 0.625), ('constant', 1)]
)
def test_schedule(decay, middle):
    """Two steps up, then down until the last: half of the way is in the middle of four."""
    schedule = loss.warmup_then_decay(2.0, 6, 2, decay, 0.25)
    found = [float(schedule(i)) for i in range(6)]
    np.testing.assert_allclose(found[:2], [1, 2])
    assert found[3] == pytest.approx(2 * middle)
    assert found[5] == pytest.approx(2 * (1 if decay == 'constant' else 0.25))
    assert found[2:] == sorted(found[2:], reverse=True)
    flat = loss.warmup_then_decay(2.0, 6, 2, decay, 0.25, anneal=False)
    np.testing.assert_allclose([float(flat(i)) for i in range(6)], [1, 2, 2, 2, 2, 2])
    assert float(loss.warmup_then_decay(2.0, 6, 0, decay, 0.25, anneal=False)(0)) == 2

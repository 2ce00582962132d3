"""The tagger's network against NumPy, its loss and metrics, and how optimizers see its leaves."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import precond_optax
from configs.tasks import pos_tagging as config
from experiments import optimizers, program, tasks
from experiments.tasks.pos_tagging import loss, model
from tests.experiments.small import config_of, small_task

SIZES = dict(layers=2, width=8, heads=2, qkv=4, mlp=16, dropout=0.5)


@functools.cache
def made(dtype='float32', **changes):
    """A network's definition and parameters."""
    definition = []

    def init():
        sizes = {**SIZES, **changes}
        network = model.Tagger(11, 5, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype), **sizes)
        graphdef, params = nnx.split(network, nnx.Param)
        definition.append(graphdef)
        return nnx.to_pure_dict(params)

    params = jax.jit(init)()  # one program, not one for each leaf
    return definition[0], params


def caller(graphdef):
    """From parameters, words and a key, the logits."""
    return jax.jit(lambda params, words, key=None: nnx.merge(graphdef, params)(words, key))


# Network.


def paper_shapes(num_words=12000, num_tags=835):
    sizes = {name: config.get_config()[name] for name in SIZES}

    def init():
        network = model.Tagger(num_words, num_tags, rngs=nnx.Rngs(0), **sizes)
        return nnx.to_pure_dict(nnx.state(network, nnx.Param))

    return jax.eval_shape(init)


def test_network_is_the_papers():
    """18.9M parameters in the body; 19.3M with the Dense to the tags, without the embedding."""
    shapes = paper_shapes()
    layer = 4 * 512 * 512 + 2 * 512 * 2048 + 2048 + 512 + 4 * 512
    body = model.num_body_parameters(shapes)
    assert body == 6 * layer + 2 * 512 == 18_903_040
    assert round((body + 513 * 835) / 1e6, 1) == 19.3
    assert shapes['embed']['embedding'].shape == (12000, 512)
    attention = shapes['layer_5']['attention']
    assert set(attention) == {'query', 'key', 'value', 'out'}
    assert all(set(part) == {'kernel'} for part in attention.values())
    assert attention['query']['kernel'].shape == (512, 8, 64)
    assert attention['out']['kernel'].shape == (8, 64, 512)


def test_initial_parameters():
    _, params = made(width=64, qkv=64, mlp=128)
    for part, (rows, columns) in {
        ('mlp', 'dense_0'): (64, 128),
        ('attention', 'query'): (64, 64),
        ('attention', 'out'): (64, 64),
    }.items():
        kernel = np.abs(params['layer_1'][part[0]][part[1]]['kernel'])
        bound = np.sqrt(6 / (rows + columns))
        assert 0.95 * bound < kernel.max() <= bound
    assert not np.any(params['layer_0']['mlp']['dense_0']['bias'])
    assert not np.any(params['output']['bias'])


def oracle_logits(params, words, heads):
    """One sentence without padding, in float64 NumPy."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, own):
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * own['scale']
            + (own['bias'])
        )

    x = p['embed']['embedding'][words]
    length, width = x.shape
    for t, i in itertools.product(range(length), range(width)):
        angle = t / 10000 ** (i // 2 * 2 / width)
        x[t, i] += np.cos(angle) if i % 2 else np.sin(angle)
    for layer in (p[f'layer_{i}'] for i in range(SIZES['layers'])):
        attention, y = layer['attention'], norm(x, layer['attention_norm'])
        added = 0
        for head in range(heads):
            q, k, v = (y @ attention[n]['kernel'][:, head] for n in ('query', 'key', 'value'))
            scores = np.exp(q @ k.T / np.sqrt(q.shape[1]))
            added = (
                added
                + scores / scores.sum(1, keepdims=True) @ v @ attention['out']['kernel'][head]
            )
        x = x + added
        mlp, y = layer['mlp'], norm(x, layer['mlp_norm'])
        y = y @ mlp['dense_0']['kernel'] + mlp['dense_0']['bias']
        y = np.where(y > 0, y, np.exp(y) - 1)
        x = x + y @ mlp['dense_1']['kernel'] + mlp['dense_1']['bias']
    return norm(x, p['norm']) @ p['output']['kernel'] + p['output']['bias']


def test_padding_changes_nothing():
    """A sentence has the oracle's logits, alone or in a batch with longer and empty ones."""
    graphdef, params = made()
    rng = np.random.default_rng(1)  # so that biases and scales show
    params = jax.tree.map(lambda x: np.float32(x + 0.3 * rng.normal(size=x.shape)), params)
    sentences = [[3, 4, 5, 6, 7], [8], [2, 10, 1], []]
    padded = np.array([s + [0] * (7 - len(s)) for s in sentences])
    call = caller(graphdef)
    together = call(params, padded)
    assert np.all(np.isfinite(together))
    for row, words in enumerate(sentences[:3]):
        expected = oracle_logits(params, words, SIZES['heads'])
        np.testing.assert_allclose(together[row, : len(words)], expected, rtol=1e-4, atol=1e-4)
    alone = call(params, np.array([sentences[2]]))[0]
    np.testing.assert_allclose(alone, together[2, :3], rtol=1e-4, atol=1e-4)


def test_dropout():
    """Off without a key, as if there were none; with one it hangs on the key alone."""
    words = jnp.asarray([[3, 4, 5]])
    (graphdef, params), (plain, _) = made(), made(dropout=0.0)
    call, keys = caller(graphdef), jax.random.split(jax.random.key(0), 2)
    expected = caller(plain)(params, words)
    np.testing.assert_allclose(call(params, words), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(call(params, words, keys[0]), call(params, words, keys[0]))
    assert np.abs(call(params, words, keys[0]) - call(params, words, keys[1])).max() > 0.1


SITES = {
    'embedding': lambda net: (net.dropout, 'rate'),
    'weights': lambda net: (net.layer_0.attention, 'dropout_rate'),
    'hidden': lambda net: (net.layer_0.mlp.dropout, 'rate'),
    'added': lambda net: (net.layer_0.dropout, 'rate'),
}


@pytest.mark.parametrize('site', [None, *SITES])
def test_each_dropout_drops_by_itself(site):
    net = model.Tagger(11, 5, rngs=nnx.Rngs(0), **{**SIZES, 'dropout': 0.0})
    if site:
        place, name = SITES[site](net)
        setattr(place, name, 0.5)
    words, keys = jnp.asarray([[3, 4, 5]]), jax.random.split(jax.random.key(0), 2)
    first, second = (net(words, key) for key in keys)
    assert bool((first != second).any()) == bool(site)


@pytest.mark.parametrize('zeroed', [(), ('attention',), ('mlp',)])
def test_what_a_layer_adds_is_dropped(zeroed):
    """Half of its entries, where the attention, the dense layers or both add something."""
    graphdef, params = made()
    params = jax.tree.map(lambda x: x, params)
    for name in zeroed:
        last = {'attention': 'out', 'mlp': 'dense_1'}[name]
        params['layer_0'][name][last]['kernel'] = 0 * params['layer_0'][name][last]['kernel']

    @jax.jit
    def added(params, x):
        layer = nnx.merge(graphdef, params).layer_0
        mask = jnp.ones((1, 1, 1, x.shape[1]), bool)
        return layer(x, mask, nnx.Rngs(dropout=jax.random.key(0))) - x

    x = jax.random.normal(jax.random.key(1), (200, 3, 8))
    kept = float(jnp.mean(added(params, x) != 0))
    assert kept == pytest.approx(0.5 if zeroed else 0.75, abs=0.05)


def test_bfloat16_arithmetic_keeps_float32_parameters():
    words, tags = jnp.asarray([[3, 4, 5, 0]]), jnp.asarray([[1, 2, 3, -1]])
    found = {}
    for dtype in ('float32', 'bfloat16'):
        graphdef, params = made(dtype)
        call = caller(graphdef)
        step = jax.jit(jax.value_and_grad(lambda p, c=call: loss.mean_loss(c(p, words), tags)))
        value, grads = step(params)
        assert {x.dtype.name for x in jax.tree.leaves((params, grads))} == {'float32'}
        assert value.dtype == 'float32'
        found[dtype] = call(params, words)
        assert found[dtype].dtype == 'float32'
        text = str(jax.make_jaxpr(call)(params, words))
        assert ('bf16' in text) == (dtype == 'bfloat16')
    error = np.abs(found['bfloat16'] - found['float32']).max()
    assert 1e-4 < error < 0.1


# Loss and metrics.


def test_metrics_against_numpy(rng):
    words = np.array([[2, 3, 1, 0], [4, 0, 0, 0], [5, 6, 0, 0], [0, 0, 0, 0]])
    tags = np.array([[1, -1, 0, -1], [2, -1, -1, -1], [0, 1, -1, -1], [-1, -1, -1, -1]])
    logits = rng.normal(size=(4, 4, 3)).astype(np.float32)
    logits[1, 0, 2] = logits[2, 0, 0] = logits[2, 1, 1] = logits[0, 0, 1] = 9
    logits[0, 2, 1] = 9  # wrong
    losses, right, whole = [], [], []
    for row in range(3):
        length = int((words[row] > 0).sum())
        own = []
        for place in range(length):
            own.append(logits[row, place].argmax() == tags[row, place])
            if tags[row, place] >= 0:
                p = np.exp(logits[row, place].astype(np.float64))
                losses.append(-np.log(p[tags[row, place]] / p.sum()))
        right += own
        whole.append(all(own))
    assert sum(right) == 4
    assert whole == [False, True, True]
    parts = [
        loss.counts(*(jnp.asarray(x[i]) for x in (logits, words, tags)))
        for i in (slice(2), slice(2, 4))
    ]
    found = loss.ratios(jax.tree.map(lambda *x: sum(x), *parts))
    assert float(found['loss']) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(found['accuracy']) == pytest.approx(4 / 6)
    assert float(found['accuracy_with_root']) == pytest.approx((4 + 3) / (6 + 3))
    assert float(found['sentence_accuracy']) == pytest.approx(2 / 3)
    assert float(loss.mean_loss(jnp.asarray(logits), jnp.asarray(tags))) == pytest.approx(
        np.mean(losses), rel=1e-5
    )


def test_confusions():
    answers = [('a', 'a')] * 9 + [('a', 'b')] * 2 + [('b', 'a')] * 3 + [('b', 'c')] * 2
    assert loss.confusions(iter(answers), 2) == [('b', 'a', 3), ('a', 'b', 2)]


def test_schedule():
    schedule = loss.warmup_then_inverse_root(2.0, epochs=4, warmup_epochs=2, steps_per_epoch=2)
    expected = [0.5, 1, 1.5, 2, 2 * np.sqrt(4 / 5), 2 * np.sqrt(4 / 6)]
    np.testing.assert_allclose([float(schedule(i)) for i in range(6)], expected, rtol=1e-6)
    flat = loss.warmup_then_inverse_root(2.0, 4, 2, 2, anneal=False)
    np.testing.assert_allclose([float(flat(i)) for i in range(6)], [0.5, 1, 1.5, 2, 2, 2])
    with pytest.raises(ValueError, match=r'warmup_epochs must be in \[1, .*4\], got 5'):
        loss.warmup_then_inverse_root(2.0, 4, 5, 2)


# Layout.


@pytest.mark.parametrize(
    'name', ['sonew', 'shared_basis', 'mbag', 'block_adam', 'shampoo', 'sketchy']
)
def test_plan_sees_attention_kernels_as_matrices(name):
    """(512, 8, 64) and (8, 64, 512) as (512, 512); the embedding gets a first-order direction."""
    from experiments.tasks import pos_tagging as task

    layout = optimizers.make(config_of('optimizers', name), lambda peak: peak, 10, task.LAYOUT)
    plan = precond_optax.plan(layout, paper_shapes())
    leaves = {leaf.path: leaf for leaf in plan.leaves}
    for part in ('query', 'key', 'value', 'out'):
        leaf = leaves[f'layer_3/attention/{part}/kernel']
        assert 'seen as 512x512' in leaf.reason
        assert 'direction' not in leaf.treatment
    assert leaves['embed/embedding'].reason == "rule '^embed/'"
    assert leaves['output/kernel'].reason == leaves['layer_0/mlp/dense_0/kernel'].reason == '2-D'
    assert not plan.unmatched_rules


def test_a_run_s_optimizer_has_the_layout():
    small = small_task('pos_tagging')
    task = tasks.make(small, None)
    params = jax.eval_shape(task.init, jax.random.key(0))
    tx = program.make_tx(task, small, config_of('optimizers', 'sonew'))
    reasons = {leaf.path: leaf.reason for leaf in precond_optax.plan(tx, params).leaves}
    assert reasons['embed/embedding'] == "rule '^embed/'"
    assert reasons['layer_0/attention/query/kernel'].startswith('seen as 8x8')

"""The tagger's parts: sentences, batches, network, loss; what a run of it keeps and resumes."""

import collections
import functools
import itertools
import json
import types

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import precond_optax
from configs.tasks import pos_tagging as config
from experiments import optimizers, program, report, sweep, tasks, train
from experiments.tasks.pos_tagging import batches, loss, model, reading, vocabulary
from tests.experiments.small import config_of, lines, small_task, without_clock

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


# Sentences.


def conllu(*rows):
    return '\n'.join('\t'.join(row) for row in rows)


def word(number, form, upos='X', xpos='x---'):
    return (str(number), form, '_', upos, xpos, 'A=B|C=D', '0', '_', '_', 'SpaceAfter=No')


GOOD = (
    '# sent_id = 1\n# text = a b  c\n'
    + conllu(
        word('1-2', 'ab', '_', '_'), word(1, 'a', 'X', 'x1'), word(2, 'b', 'Y', 'y1'),
        word('2.1', 'null', '_', '_'), word(3, 'c c', 'X', 'x2'),
    )
    + '\n\n\n'
    + conllu(word(1, '#', 'Z', 'z1')).replace('\n', '\r\n')
    + '\r\n'
)  # fmt: skip


def test_reading(tmp_path):
    """Ranges and empty nodes are left out; comments, blank lines and line ends do not matter."""
    file = tmp_path / 'a.conllu'
    file.write_bytes(GOOD.encode())
    expected = [(('a', 'b', 'c c'), ('x1', 'y1', 'x2')), (('#',), ('z1',))]
    assert list(reading.read(file, 'xpos')) == expected
    assert [s.tags for s in reading.read(file, 'upos')] == [('X', 'Y', 'X'), ('Z',)]


@pytest.mark.parametrize(
    ('content', 'line', 'problem'),
    [
        (conllu(word(1, 'a'), word(2, 'b')[:9]), 2, '10 columns between tabs are needed, found 9'),
        (conllu(word(1, 'a'), (*word(2, 'b'), '_')), 2, 'found 11'),
        (conllu(word(1, 'a')).replace('\t', ' '), 1, 'found 1'),
        ('# c\n' + conllu(word(1, 'a'), word(3, 'b')), 3, "word 2 should come here, got '3'"),
        (conllu(word(1, 'a'), word(1, 'b')), 2, "word 2 should come here, got '1'"),
        (conllu(word(1, 'a'), word('x', 'b')), 2, "'x' is not a valid ID"),
        (conllu(word(1, 'a'), word('_', 'b')), 2, "word 2 should come here, got '_'"),
        (conllu(word(1, 'a'), word(2, '')), 2, 'an empty column'),
        (conllu(word(1, 'a'), word(2, 'b  c')), 2, 'two spaces in one'),
        (conllu((*word(1, 'a')[:6], 'up', '_', '_', '_')), 1, "field 'head'"),
        (conllu(word(1, 'a'), word(2, 'b', 'X', '_')), 2, "'b' has no XPOS .column 5 is _."),
        (conllu(word(1, 'a')) + '\n\n# c\n\n', 3, 'a sentence without words'),
        ('\n\n', 3, 'no sentence'),
        ('', 1, 'no sentence'),
    ],
)
def test_malformed_file_is_named_with_its_line(content, line, problem, tmp_path):
    file = tmp_path / 'a.conllu'
    file.write_text(content)
    with pytest.raises(ValueError, match=rf'a.conllu:{line}: .*{problem}'):
        reading.read(file, 'xpos')


def test_file_that_is_not_utf8(tmp_path):
    file = tmp_path / 'a.conllu'
    file.write_bytes(conllu(word(1, 'a')).encode() + b'\n2\t\xff')
    with pytest.raises(ValueError, match=r'a\.conllu:2: not UTF-8'):
        reading.read(file, 'xpos')


def files_task(folder, **changes):
    for name in ('one', 'two', 'dev', 'test'):
        (folder / f'{name}.conllu').write_text(GOOD)
    files = dict(
        train_files=('one.conllu', 'two.conllu'),
        dev_files=('dev.conllu',),
        test_files=('test.conllu',),
    )
    return small_task('pos_tagging', source='conllu', batch_size=2, **{**files, **changes})


def test_files_of_a_config(tmp_path):
    """Several training files follow each other; a broken or missing one stops the run at once."""
    task = tasks.make(files_task(tmp_path), str(tmp_path))
    assert (task.num_train, task.steps_per_epoch) == (4, 2)
    missing = files_task(tmp_path, dev_files=('none.conllu',))
    adam = config_of('optimizers', 'adam')
    with pytest.raises(FileNotFoundError, match=r'none\.conllu: no such file; --data_dir'):
        train.prepare(missing, adam, tmp_path / 'run', str(tmp_path))
    broken = files_task(tmp_path)
    (tmp_path / 'two.conllu').write_text(GOOD.replace('\t', ' '))
    reading.load.cache_clear()
    with pytest.raises(ValueError, match=r'two\.conllu:3: 10 columns'):
        train.prepare(broken, adam, tmp_path / 'run', str(tmp_path))
    assert not (tmp_path / 'run').exists()


def test_a_run_does_not_go_on_with_other_sentences(tmp_path):
    """The same words as often, but one tag: rows of the output would mean something else."""
    config, adam = files_task(tmp_path), config_of('optimizers', 'adam')
    with train.prepare(config, adam, tmp_path / 'run', str(tmp_path)).run:
        pass
    held = json.loads((tmp_path / 'run/vocabulary.json').read_text())
    encoded = tasks.make(config, str(tmp_path)).artifacts['vocabulary.json']
    assert json.loads(encoded) == held
    assert set(held) == {'words from 2 on', 'tags', 'sentences'}
    changed = (tmp_path / 'two.conllu').read_text().replace('x1', 'z1', 1)
    (tmp_path / 'two.conllu').write_text(changed)
    reading.load.cache_clear()
    with pytest.raises(ValueError, match=r'vocabulary.json is not what the data give now'):
        train.prepare(config, adam, tmp_path / 'run', str(tmp_path))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(source='mnist'), r"task.source must be one of .*, got 'mnist'"),
        (dict(tags='feats'), r"task.tags must be one of .*, got 'feats'"),
        (dict(batch_size=257), r'task.batch_size must be in \[1, 256\]'),
        (dict(batch_size=0), r'task.batch_size must be an integer >= 1'),
        (dict(heads=3), r'task.qkv a multiple of task.heads, got 8, 8 and 3'),
        (dict(dropout=1.0), r'task.dropout must be in \[0, 1\), got 1.0'),
        (dict(dtype='float16'), r"task.dtype must be .* got 'float16'"),
        (dict(buckets=()), r'task.buckets must be integers >= 1, one at least'),
        (dict(buckets=(8, 4)), r'task.buckets must rise'),
        (dict(buckets=(4,)), r'task.buckets must reach the longest sentence, of 8 words'),
        (dict(evaluate_every_epochs=0), 'task.evaluate_every_epochs must be an integer >= 1'),
        (dict(warmup_epochs=9), 'task.warmup_epochs must be in'),
        (dict(source='conllu', dev_files=()), 'task.dev_files must be one file or more'),
        (dict(source='tfds', tfds_config=''), 'needs task.tfds_config'),
    ],
)
def test_bad_config(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train.check(small_task('pos_tagging', **changes), config_of('optimizers', 'adam'))


def test_tfds(monkeypatch, tmp_path):
    """What TFDS's builder gives: bytes, class labels, and multiword tokens and empty nodes."""
    import tensorflow_datasets as tfds

    asked = []

    class Prepared(list):
        names = types.SimpleNamespace(names=['_', 'NOUN', 'VERB'])
        features = {'upos': types.SimpleNamespace(feature=names)}
        dataset_info = types.SimpleNamespace(features=features)

    def data_source(name, **keywords):
        asked.append((name, keywords['split'], keywords['data_dir'], keywords['download']))
        return Prepared([example])

    # As in CoNLL-U: 1-2 ab, 1 a, 1.1 x, 2 b.
    example = dict(
        idx=b's1',
        tokens=[b'ab', b'a', b'x', b'b'],
        xpos=[b'None', b'n', b'v', b'v'],
        upos=[0, 1, 2, 2],
        head=[b'None', b'0', b'_', b'1'],
    )

    monkeypatch.setattr(tfds, 'data_source', data_source)
    found = reading.load('tfds', 'upos', (), 'grc_perseus', str(tmp_path))
    assert found.train == found.test == ((('a', 'b'), ('NOUN', 'VERB')),)
    assert reading.load('tfds', 'xpos', (), 'grc_perseus', None).dev[0].tags == ('n', 'v')
    name = 'universal_dependencies/grc_perseus'
    assert asked[:3] == [(name, split, str(tmp_path), False) for split in ('train', 'dev', 'test')]
    for tags, changes, message in (
        ('xpos', dict(xpos=[b'None', b'n', b'v', b'None']), "train, sentence s1: 'b' has no XPOS"),
        ('upos', dict(upos=[0, 0, 2, 2]), "train, sentence s1: 'a' has no UPOS; see task.tags"),
        ('upos', dict(head=[b'None'] * 4), 'train, sentence s1: a sentence without words'),
    ):
        wrong = Prepared([example | changes])
        monkeypatch.setattr(tfds, 'data_source', lambda *_, wrong=wrong, **__: wrong)
        with pytest.raises(ValueError, match=message):
            reading.load('tfds', tags, (), 'grc_perseus', str(tmp_path / 'other'))


def test_tfds_that_is_not_prepared(tmp_path):
    pytest.importorskip('conllu')
    with pytest.raises(FileNotFoundError, match=r'universal_dependencies/grc_perseus is not prep'):
        reading.load('tfds', 'xpos', (), 'grc_perseus', str(tmp_path))


def test_vocabulary_and_baseline():
    sentence = reading.Sentence
    corpus = (sentence(('b', 'a', 'c'), ('x', 'y', 'x')), sentence(('b', 'a'), ('y', 'y')))
    vocab = vocabulary.build(corpus)
    assert vocab == (('a', 'b', 'c'), ('y', 'x'))
    assert vocab.num_words == 5
    assert vocabulary.build(corpus[::-1]) == vocab
    assert vocabulary.build(corpus, min_count=2).words == ('a', 'b')
    encoded = vocabulary.encode((sentence(('c', 'new', 'a'), ('x', 'y', 'z')),), vocab)
    assert [list(x[0]) for x in encoded] == [[4, vocabulary.UNKNOWN, 2], [1, 0, vocabulary.NO_TAG]]
    # b: x and y once each, x first; new: y, the most frequent of all; a: y.
    held = (sentence(('b', 'new', 'a', 'b'), ('x', 'y', 'x', 'x')),)
    assert vocabulary.most_frequent_tag_accuracy(corpus, held) == 3 / 4
    assert vocabulary.most_frequent_tag_accuracy(corpus[::-1], held) == 1 / 4


# Batches.


def encoded_of(lengths):
    """Sentence i has the words i + 2, ..."""
    words = tuple(np.full(n, i + 2, np.int32) for i, n in enumerate(lengths))
    return vocabulary.Encoded(words, words)


def source_of(lengths, buckets=(4, 8, 16), size=4, **keywords):
    return batches.Source(
        encoded_of(lengths), buckets, size, **{'epochs': 3, 'seed': 0, **keywords}
    )


@hypothesis.given(
    lengths=st.lists(st.integers(1, 16), min_size=1, max_size=40),
    buckets=st.sets(st.integers(1, 15)).map(lambda some: (*sorted(some), 16)),
    size=st.integers(1, 7),
    seed=st.integers(0, 5),
)
def test_each_sentence_comes_once_in_an_epoch(lengths, buckets, size, seed):
    source = source_of(lengths, buckets, size, seed=seed)
    known = {like['words'].shape for like in source.shapes}
    assert len(source) == 3 * source.steps_per_epoch
    for epoch in range(3):
        first = epoch * source.steps_per_epoch
        found, partial = collections.Counter(), 0
        for step in range(first, first + source.steps_per_epoch):
            batch = source[step]
            assert batch['step'] == step
            assert batch['words'].shape == batch['tags'].shape
            assert batch['words'].shape in known
            rows = [row[row > 0] for row in batch['words'] if row.any()]
            partial += len(rows) < size
            for row, tags in zip(rows, batch['tags'], strict=False):
                assert len(set(row)) == 1
                assert len(row) == lengths[row[0] - 2]
                np.testing.assert_array_equal(tags, [*row] + [-1] * (len(tags) - len(row)))
                found[int(row[0]) - 2] += 1
        assert found == dict.fromkeys(range(len(lengths)), 1)
        assert partial <= 1


def same(first, second):
    first, second = list(first), list(second)
    return len(first) == len(second) and all(
        np.array_equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a
    )


def test_batches_hang_on_seed_and_step_alone(rng):
    lengths = rng.integers(1, 17, size=50)
    source = source_of(lengths)
    whole = list(batches.stream(source, 50).batches(0))
    assert len(whole) == len(source) == 3 * 13
    for step in (0, 1, 13, 20, 38):
        assert same(batches.stream(source_of(lengths), 50).batches(step), whole[step:])
    per_epoch = source.steps_per_epoch
    assert not same(
        [b | {'step': 0} for b in whole[:per_epoch]],
        [b | {'step': 0} for b in whole[per_epoch : 2 * per_epoch]],
    )
    assert not same(whole, batches.stream(source_of(lengths, seed=1), 50).batches(0))
    shapes = [batch['words'].shape for batch in whole[:per_epoch]]
    assert shapes != sorted(shapes), 'short and long batches are mixed'


def test_processes_read_parts_of_each_batch(rng):
    lengths = rng.integers(1, 17, size=50)
    whole = source_of(lengths, size=6)
    parts = [source_of(lengths, size=6, shard_index=i, shard_count=3) for i in range(3)]
    for part in parts:
        assert {like['words'].shape[0] for like in part.shapes} == {2}
        assert len(part) == len(whole)
    for step in range(len(whole)):
        own = [part[step] for part in parts]
        for name in ('words', 'tags'):
            np.testing.assert_array_equal(
                np.concatenate([p[name] for p in own]), whole[step][name]
            )
    with pytest.raises(ValueError, match='multiple of the 4 processes, got 6'):
        source_of(lengths, size=6, shard_count=4)


def test_padding_waste():
    # Two batches of two: lengths 3 and 4 in four places, 4 (left over) and 7 in eight.
    assert batches.padding_waste(np.array([3, 7, 4, 4]), (4, 8), 2) == 1 - 18 / (8 + 16)
    assert batches.padding_waste(np.array([3, 7, 4, 4]), (8,), 2) == 1 - 18 / 32


# Runs.


@pytest.fixture(scope='module')
def small():
    return tasks.make(small_task('pos_tagging', layers=2, dropout=0.5), None)


def test_dropout_of_a_step(small):
    """By seed and step; none in an evaluation."""
    params = small.init(jax.random.key(0))
    batch = next(small.stream.batches(0))
    first, again = small.loss(params, batch), small.loss(params, batch)
    assert first == again
    assert small.loss(params, batch | {'step': np.int32(1)}) != first
    other = tasks.make(small_task('pos_tagging', layers=2, dropout=0.5, seed=1), None)
    assert other.loss(params, batch) != first
    plain = tasks.make(small_task('pos_tagging', layers=2, dropout=0.0), None)
    assert plain.loss(params, batch) != first
    for name, value in small.evaluate(params).items():
        np.testing.assert_allclose(value, plain.evaluate(params)[name], rtol=1e-5)


def test_words_are_dropped():
    """As often as asked, no padding, and in training alone."""
    words = jnp.asarray([[2, 3, 4, 0]] * 2000)
    told = model.drop_words(jax.random.key(0), words, 0.2)
    assert set(map(int, np.unique(told))) == {0, 1, 2, 3, 4}
    np.testing.assert_array_equal(told == 0, words == 0)
    assert float(jnp.mean(told[:, :3] == vocabulary.UNKNOWN)) == pytest.approx(0.2, abs=0.02)
    np.testing.assert_array_equal(jnp.where(told == 1, words, told), words)
    made = (small_task('pos_tagging', dropout=0.0, word_dropout=rate) for rate in (0.0, 0.5))
    plain, dropped = (tasks.make(config, None) for config in made)
    params, batch = plain.init(jax.random.key(0)), next(plain.stream.batches(0))
    assert dropped.loss(params, batch) != plain.loss(params, batch)
    assert dropped.loss(params, batch | {'step': np.int32(1)}) != dropped.loss(params, batch)
    assert dropped.evaluate(params) == plain.evaluate(params)


def test_evaluation_is_that_of_all_sentences(small):
    """Against one sentence at a time, with the network's own logits."""
    params = small.init(jax.random.key(0))
    splits = reading.load('synthetic', 'xpos')
    vocab = vocabulary.build(splits.train)
    encoded = vocabulary.encode(splits.dev, vocab)
    sizes = {**{name: small_task('pos_tagging')[name] for name in SIZES}, 'layers': 2}
    graphdef = nnx.graphdef(
        nnx.eval_shape(
            lambda: model.Tagger(vocab.num_words, len(vocab.tags), rngs=nnx.Rngs(0), **sizes)
        )
    )
    call = caller(graphdef)
    right, whole, wrong = 0, 0, collections.Counter()
    for words, tags in zip(*encoded, strict=True):
        padded = np.zeros((1, 9), np.int32)
        padded[0, : len(words)] = words
        told = np.argmax(call(params, padded)[0, : len(words)], -1)
        right += (told == tags).sum()
        whole += (told == tags).all()
        wrong.update(
            (vocab.tags[a], vocab.tags[b]) for a, b in zip(tags, told, strict=True) if a != b
        )
    tokens, count = encoded.lengths.sum(), len(splits.dev)
    found = small.evaluate(params)
    assert set(small.validate(params)) == set(found) - {'train_loss'}
    assert float(found['dev_accuracy']) == pytest.approx(right / tokens)
    assert float(found['dev_accuracy_with_root']) == pytest.approx(
        (right + count) / (tokens + count)
    )
    assert float(found['dev_sentence_accuracy']) == pytest.approx(whole / count)
    described = small.describe(params)
    expected = sorted(wrong.items(), key=lambda item: (-item[1], item[0]))[:10]
    assert described['dev_confusions'] == [(*pair, n) for pair, n in expected]
    assert described['most_frequent_tag']['dev_accuracy'] > 0.6


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A run's task, its folder and its summary."""
    task = small_task('pos_tagging', epochs=3, log_every=2, buckets=(4, 8))
    task.update(checkpoint_every_epochs=1, evaluate_every_epochs=1)
    folder = tmp_path_factory.mktemp('whole')
    adam = config_of('optimizers', 'adam')
    return task, folder, train.train_and_evaluate(task, adam, folder, progress=False)


def test_resumed_run_is_the_same_bit_for_bit(whole, tmp_path):
    """Cut in an epoch, after the first checkpoint; with dropout, and with a best of dev."""
    task, folder, summary = whole
    adam = config_of('optimizers', 'adam')
    assert task.dropout > 0
    stopped = train.train_and_evaluate(task, adam, tmp_path, progress=False, stop_after=6)
    assert stopped == {'step': 6}
    assert [row['step'] for row in lines(tmp_path)] == [2, 4, 6]
    resumed = train.train_and_evaluate(task, adam, tmp_path, progress=False)
    assert without_clock([resumed]) == without_clock([summary])
    assert without_clock(lines(tmp_path)) == without_clock(lines(folder))


def test_length_of_segments_does_not_change_the_run(whole, tmp_path):
    task, _, summary = whole
    task, adam = task.copy_and_resolve_references(), config_of('optimizers', 'adam')
    task.log_every = 5
    found = train.train_and_evaluate(task, adam, tmp_path, progress=False)
    assert [row['step'] for row in lines(tmp_path)] == [5, 10, 12]
    for name in ('train_loss', 'dev_loss', 'dev_accuracy'):
        assert found[name] == summary[name]


def test_report(whole, tmp_path):
    """Accuracies, best first, the tagger that knows nothing but words, ten confusions."""
    _, folder, summary = whole
    text = report.report([str(folder)], str(tmp_path / 'report'))
    rows = [[c.strip() for c in row.split('|')] for row in text.split('\n\n')[1].splitlines()]
    run, baseline = rows[2:]
    assert run[1:4] == [
        'adam',
        str(summary['best_dev_step']),
        f'{100 * summary["best_dev_accuracy"]:.2f}',
    ]
    assert run[5] == f'{100 * summary["at_best_dev"]["dev_accuracy_with_root"]:.2f}'
    assert baseline[1] == 'most frequent tag'
    assert float(baseline[3]) > 60
    assert 'Most frequent errors on dev of adam, at the end' in text
    assert text.count(' as t') == len(summary['dev_confusions']) <= 10

    def better(label, accuracy):
        best = {**summary['at_best_dev'], 'dev_accuracy': accuracy}
        own = {**summary, 'best_dev_accuracy': accuracy, 'at_best_dev': best}
        return report.Run(label, {}, [], own)

    unfinished = report.Run('unfinished', {}, [], {})
    text = report.accuracies([better('a', 0.1), unfinished, better('b', 0.9), better('c', 0.5)])
    assert [row.split('|')[1].strip() for row in text.splitlines()[2:5]] == ['b', 'c', 'a']
    assert report.accuracies([unfinished]) == ''


def test_best_of_dev_is_kept(tmp_path):
    """A large learning rate, so that the last is not the best."""
    task = small_task('pos_tagging', epochs=6, evaluate_every_epochs=2)
    adam = config_of('optimizers', 'adam')
    adam.learning_rate = 1.0
    summary = train.train_and_evaluate(task, adam, tmp_path, progress=False)
    rows = [row for row in lines(tmp_path) if 'dev_accuracy' in row]
    assert [row['step'] for row in rows] == [8, 16, 24]
    best = max(row['dev_accuracy'] for row in rows)
    first = next(row for row in rows if row['dev_accuracy'] == best)
    assert summary['best_dev_accuracy'] == best
    assert summary['best_dev_step'] == first['step']
    assert summary['at_best_dev']['test_accuracy'] == first['test_accuracy']
    assert summary['dev_accuracy'] == rows[-1]['dev_accuracy']


@pytest.mark.slow
def test_several_runs_in_one_program(tmp_path):
    """As alone, to rounding."""
    task, rates = small_task('pos_tagging'), (1e-3, 1e-2)

    def prepared(kind, rate):
        adam = config_of('optimizers', 'adam')
        adam.learning_rate = rate
        return train.prepare(task, adam, tmp_path / f'{kind}{rate}')

    together = train.train_together([prepared('all', rate) for rate in rates], progress=False)
    alone = train.train(prepared('one', rates[1]), progress=False)
    for name in ('train_loss', 'dev_loss', 'best_dev_accuracy'):
        assert together[1][name] == pytest.approx(alone[name], rel=1e-4)
    assert together[0]['train_loss'] != together[1]['train_loss']


def test_sweep_looks_for_the_largest_accuracy(monkeypatch, tmp_path):
    """A run that left the numbers behind is the last; losses are still to be small."""
    accuracies = [0.5, None, 0.9]

    def trained(experiments, together, stop_after=None):
        return [{'best_dev_accuracy': a, 'dev_loss': a} for a in accuracies]

    monkeypatch.setattr(sweep, '_train', trained)
    search = dict(sampler='grid', seed=0, space=dict(learning_rate=dict(grid=(1e-3, 2e-3, 3e-3))))
    found = {
        metric: sweep.sweep(
            small_task('pos_tagging'),
            config_of('optimizers', 'adam'),
            search | {'metric': metric},
            tmp_path / metric,
        )
        for metric in ('best_dev_accuracy', 'dev_loss')
    }
    ranked = [(row['trial'], row['metric']) for row in found['best_dev_accuracy']]
    assert ranked == [('002', 0.9), ('000', 0.5), ('001', -np.inf)]
    assert [row['trial'] for row in found['dev_loss']] == ['000', '002', '001']


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


# Real data.


def test_real_data(data_dir):
    """Sizes as the data's README says; the most frequent tag is right for 67.0 % of dev."""
    splits = load_real(config.get_config(), data_dir)
    assert [len(corpus) for corpus in splits] == [10_345, 1_137, 1_306]
    assert [sum(len(s.words) for s in corpus) for corpus in splits] == [161_593, 22_135, 20_959]
    vocab = vocabulary.build(splits.train)
    assert (len(vocab.words), len(vocab.tags)) == (35_856, 835)
    baseline = [vocabulary.most_frequent_tag_accuracy(splits.train, c) for c in splits[1:]]
    assert [round(100 * part, 1) for part in baseline] == [67.0, 60.7]
    dev = vocabulary.encode(splits.dev, vocab)
    unknown = sum((words == vocabulary.UNKNOWN).sum() for words in dev.words) / 22_135
    unseen = sum((tags == vocabulary.NO_TAG).sum() for tags in dev.tags) / 22_135
    assert (round(100 * (1 - unknown), 1), round(100 * (1 - unseen), 1)) == (81.5, 99.9)
    lengths = vocabulary.encode(splits.train, vocab).lengths
    waste = batches.padding_waste(lengths, config.get_config().buckets, 128)
    assert round(100 * waste, 1) == 23.2


def test_real_small_data(data_dir):
    from configs.tasks import pos_tagging_small

    small = pos_tagging_small.get_config()
    splits = load_real(small, data_dir)
    assert [len(corpus) for corpus in splits] == [727, 439, 410]
    assert [sum(len(s.words) for s in corpus) for corpus in splits] == [18_440, 10_723, 10_346]
    small.tags = 'xpos'
    with pytest.raises(ValueError, match=r'grc_ptnk-ud-train\.conllu:\d+: .* has no XPOS'):
        load_real(small, data_dir)


def load_real(task, data_dir):
    files = tuple(tuple(task[f'{split}_files']) for split in ('train', 'dev', 'test'))
    return reading.load('conllu', task.tags, files, None, data_dir)

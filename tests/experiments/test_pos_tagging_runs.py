"""The tagger as a task: what it evaluates, drops, keeps, resumes and reports."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import report, sweep, tasks, train
from experiments.tasks.pos_tagging import model, reading, vocabulary
from tests.experiments.small import config_of, lines, small_task, without_clock
from tests.experiments.test_pos_tagging import SIZES, caller


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

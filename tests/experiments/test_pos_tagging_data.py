"""The tagger's data: sentences from files and TFDS, vocabularies, batches by properties."""

import collections
import json
import types

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from configs.tasks import pos_tagging as config
from experiments import tasks, train
from experiments.tasks.pos_tagging import batches, reading, vocabulary
from tests.experiments.small import config_of, small_task

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

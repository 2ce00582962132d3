"""The language model's data: text, tokens, rows, batches."""

import collections
import io
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from experiments.tasks.language_model import batches, reading, tokens

sentencepiece = pytest.importorskip('sentencepiece')

SYNTHETIC = reading.load('synthetic', validation_fraction=0.05)
SIZE = 320  # tokens of a model that is trained on it


# Text.


def folder_of(path, **texts):
    for name, text in texts.items():
        (path / f'{name}.txt').write_bytes(text.encode())
    return str(path)


def as_tuples(documents):
    return tuple(map(tuple, documents))


def test_files(tmp_path):
    """Files, folders and patterns; sorted, each once; line ends as they are."""
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'sub' / 'no.md').write_text('not text')
    folder_of(tmp_path / 'sub', b='b' * 10, a='a\r\n' + 'a' * 7)
    root = folder_of(tmp_path, c='cé' * 5)
    a, b, c = ('a\r\n' + 'a' * 5, 'b' * 8, 'cé' * 4)
    for files, expected in (
        (('sub',), (a, b)),
        (('sub/*.txt', 'c.txt'), (a, b, c)),
        (('c.txt', 'sub/b.txt', 'sub'), (c, b, a)),
        ((f'{root}/c.txt',), (c,)),
    ):
        found = reading.load('text', files, 0.2, data_dir=root)
        assert tuple(found.train) == expected
        assert [len(text) for text in found.validation] == [2] * len(expected)
    found = reading.load('text', ('sub/a.txt',), 0.2, data_dir=root)
    assert found.train[0] + found.validation[0] == 'a\r\n' + 'a' * 7


@hypothesis.given(count=st.integers(1, 130), part=st.integers(2, 40))
def test_of_many_documents_whole_ones_are_held_out(count, part):
    """Evenly apart, one in so many; of few the end of each."""
    documents = tuple(f'{i:040}' for i in range(count))
    train, validation = as_tuples(reading._held_out(documents.__getitem__, count, 1 / part))
    if count <= part:
        pairs = zip(train, validation, strict=True)
        assert [first + second for first, second in pairs] == list(documents)
        return
    assert sorted(train + validation) == list(documents)
    assert len(validation) == round(count / part)
    numbers = [int(text) for text in validation]
    ends = [-numbers[0] - 1, *numbers, 2 * count - 1 - numbers[-1]]  # as if it went on, mirrored
    distances = np.diff(ends)
    assert np.ptp(distances) <= 2
    assert part / 2 <= min(distances)
    assert train == tuple(sorted(train))


def test_some_documents_stay_for_training():
    held = reading._held_out(('ab', 'cd', 'ef').__getitem__, 3, 0.99)
    assert as_tuples(held) == (('cd',), ('ab', 'ef'))


def test_documents_are_read_when_they_are_asked_for(monkeypatch, tmp_path):
    root = folder_of(tmp_path, **{f'{i:03}': f'text {i}' for i in range(100)})
    read, real = [], reading._read
    monkeypatch.setattr(reading, '_read', lambda path: read.append(path.stem) or real(path))
    found = reading.load('text', ('*.txt',), 0.02, data_dir=root)
    assert (len(found.train), len(found.validation), read) == (98, 2, [])
    assert (found.train[0], read) == ('text 0', ['000'])
    parts = [found.train.part(i, 3) for i in range(3)]
    assert (sum(map(len, parts)), len(read)) == (98, 1)
    assert [text for part in parts for text in part] == list(found.train)


@pytest.mark.parametrize(
    ('files', 'message'),
    [
        (('none.txt',), r'none\.txt: no such file; --data_dir is the folder'),
        (('empty',), r'empty: no \*\.txt in this folder'),
        (('*.md',), r'\*\.md: no such file'),
    ],
)
def test_files_that_are_not_there(files, message, tmp_path):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match=message):
        reading.load('text', files, 0.1, data_dir=str(tmp_path))


def test_files_without_text(tmp_path):
    folder_of(tmp_path, blank=' \n', empty='')
    (tmp_path / 'latin.txt').write_bytes('é'.encode('latin1'))
    for name, message in (('blank', 'no text'), ('empty', 'no text'), ('latin', 'not UTF-8')):
        with pytest.raises(ValueError, match=rf'{name}\.txt: {message}'):
            list(reading.load('text', (f'{name}.txt',), 0.1, data_dir=str(tmp_path)).train)


def test_tfds(monkeypatch, tmp_path):
    """Two splits as they are, or one for both; texts are bytes, blank ones are empty."""
    import tensorflow_datasets as tfds

    asked = []

    def data_source(name, **keywords):
        asked.append((name, keywords['split'], keywords['data_dir'], keywords['download']))
        texts = [b'abcdefghij', b' '] if keywords['split'] == 'train' else [b'xyz', 'été']
        return [{'text': text} for text in texts]

    monkeypatch.setattr(tfds, 'data_source', data_source)
    (tmp_path / 'tensorflow_datasets').mkdir()
    found = reading.load('tfds', (), 0.1, 'lm1b', ('train', 'test'), str(tmp_path))
    assert as_tuples(found) == (('abcdefghij', ''), ('xyz', 'été'))
    where = str(tmp_path / 'tensorflow_datasets')
    assert asked == [('lm1b', split, where, False) for split in ('train', 'test')]
    cut = reading.load('tfds', (), 0.2, 'lm1b', ('train',), str(tmp_path))
    assert as_tuples(cut) == (('abcdefgh', ''), ('ij', ''))
    whole = reading.load('tfds', (), 0.6, 'lm1b', ('test',), str(tmp_path))
    assert as_tuples(whole) == (('xyz',), ('été',))


def test_tfds_that_is_not_prepared(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'tiny_shakespeare is not prepared in'):
        reading.load('tfds', (), 0.1, 'tiny_shakespeare', ('train',), str(tmp_path))


# Tokens.


@pytest.fixture(scope='module')
def pieces():
    return tokens.SentencePiece(tokens.train(SYNTHETIC.train, SIZE))


def tokenizers(pieces):
    return tokens.Bytes(), pieces


# All of Unicode but the surrogates, and SentencePiece's sign for a space.
TEXTS = st.text(st.characters(exclude_characters='\u2581', codec='utf-8'), min_size=1)


@hypothesis.given(text=TEXTS | st.text('ab \n\r\t', min_size=1, max_size=60))
def test_text_comes_back(pieces, text):
    """To the byte, however rare; and each token knows for how many bytes it stands."""
    for tokenizer in tokenizers(pieces):
        found = tokenizer.encode(text)
        assert tokenizer.decode(found) == text
        assert tokenizer.num_bytes[found].sum() == len(text.encode())
        assert not np.any(found == tokenizer.end)


def test_tokens_are_pieces_of_words(pieces):
    text = SYNTHETIC.validation[0]
    assert len(pieces.encode(text)) < 0.8 * len(tokens.Bytes().encode(text))
    assert pieces.num_bytes[pieces.end] == tokens.Bytes().num_bytes[256] == 0
    assert (len(pieces.num_bytes), len(tokens.Bytes().num_bytes)) == (SIZE, 257)


def test_encoding_hangs_on_no_part_of_a_text(pieces, monkeypatch):
    """Lines are encoded some at a time."""
    text = SYNTHETIC.train[0] + '\n\n' + SYNTHETIC.train[1]
    whole = pieces.encode(text)
    monkeypatch.setattr(tokens, '_LINES', 3)
    np.testing.assert_array_equal(pieces.encode(text), whole)
    np.testing.assert_array_equal(pieces._processor.encode(text), whole)


def test_training_twice_gives_the_same_bytes(pieces):
    """So all processes of a run have the same tokens. Long lines are cut."""
    assert tokens.train(SYNTHETIC.train, SIZE) == pieces.model
    one_line = [' '.join(text.split()) * 20 for text in SYNTHETIC.train[:2]]
    assert tokens.train(one_line, 300) == tokens.train(one_line, 300)


@hypothesis.given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=60), most=st.integers(1, 300)
)
def test_of_much_text_some_is_trained_on(lengths, most):
    """As many characters as may be, of documents in their order, which are spread evenly."""
    texts = tuple(chr(1000 + i) * length for i, length in enumerate(lengths))
    found = [text for text in tokens._some(texts, most) if text]
    assert sum(map(len, found)) == min(most, sum(lengths))
    numbers = [ord(text[0]) - 1000 for text in found]
    assert numbers == sorted(set(numbers))
    cut = [i for i, text in zip(numbers, found, strict=True) if text != texts[i]]
    assert len(cut) <= 1


def test_what_is_trained_on_is_spread_evenly():
    for count in (7, 100, 101, 1000):
        texts = [f'{i:04}' for i in range(count)]
        for some in (5, 40, 90):
            numbers = [int(text) for text in tokens._some(texts, 4 * min(some, count))]
            gaps = np.diff([*numbers, count + numbers[0]])
            assert len(numbers) == min(some, count)
            assert max(gaps) <= 3 * count / len(numbers)


def test_a_model_from_a_file(pieces, tmp_path):
    """It is taken as it is; the vocabulary may be larger."""
    file = tmp_path / 'some.model'
    file.write_bytes(pieces.model)
    made = tokens.make('sentencepiece', SIZE + 8, str(file), ())
    np.testing.assert_array_equal(made.encode('abc de'), pieces.encode('abc de'))
    with pytest.raises(FileNotFoundError, match=r'none: no such file, see task.tokenizer_path'):
        tokens.make('sentencepiece', SIZE, str(tmp_path / 'none'), ())
    with pytest.raises(ValueError, match=f'task.vocab_size must be at least {SIZE}, .* got 300'):
        tokens.make('sentencepiece', 300, str(file), ())


def test_a_kept_model_is_not_trained_again(pieces, monkeypatch, tmp_path):
    """And one from a file must be it."""
    monkeypatch.setattr(tokens, 'train', lambda *_: pytest.fail('trained again'))
    made = tokens.make('sentencepiece', SIZE, '', ('other texts',), pieces.model)
    assert made.model == pieces.model
    same, other = tmp_path / 'same.model', tmp_path / 'other.model'
    same.write_bytes(pieces.model)
    assert tokens.make('sentencepiece', SIZE, str(same), (), pieces.model).model == pieces.model
    other.write_bytes(b'another')
    with pytest.raises(ValueError, match=r'other.model is not the model that the run began with'):
        tokens.make('sentencepiece', SIZE, str(other), (), pieces.model)


@pytest.mark.parametrize(
    'changes',
    [
        dict(add_dummy_prefix=True),
        dict(remove_extra_whitespaces=True),
        dict(normalization_rule_name='nmt_nfkc'),
        dict(byte_fallback=False, vocab_size=100),
        {},
    ],
)
def test_a_model_that_loses_bytes_is_refused(changes):
    """The bits per byte of its tokens would be wrong; the last one here is as ours are."""
    model = io.BytesIO()
    keywords = dict(
        normalization_rule_name='identity',
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        byte_fallback=True,
        eos_id=1,
        unk_id=0,
        bos_id=-1,
        vocab_size=290,
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SYNTHETIC.train[0].split('\n')),
        model_writer=model,
        model_type='bpe',
        minloglevel=2,
        **(keywords | changes),
    )
    tokenizer, text = tokens.SentencePiece(model.getvalue()), 'ab  ﬁ \u2581 cd'
    if not changes:
        assert tokenizer.num_bytes[tokenizer.encode(text)].sum() == len(text.encode()) - 2
        return
    with pytest.raises(
        ValueError, match=r'keeps texts as they are, trained with byte_fallback=true'
    ):
        tokenizer.encode(text)


# Rows and batches.


def test_documents_are_packed_between_ends(pieces):
    for tokenizer in tokenizers(pieces):
        packed = batches.pack(('ab c', '', 'd'), tokenizer)
        end = [tokenizer.end]
        expected = [*end, *tokenizer.encode('ab c'), *end, *tokenizer.encode('d'), *end]
        np.testing.assert_array_equal(packed, expected)
        assert packed.dtype == np.uint16


def rows_of(count, length):
    return batches.Rows([np.arange(count, dtype=np.uint16)], length, 'train')


@hypothesis.given(
    count=st.integers(6, 200),
    length=st.integers(1, 5),
    size=st.integers(1, 9),
    seed=st.integers(0),
)
def test_each_token_comes_once_in_a_pass(count, length, size, seed):
    """But for fewer than a row at the end; a batch may go on into the next pass."""
    rows = rows_of(count, length)
    assert len(rows) == (count - 1) // length
    steps = math.ceil(2 * len(rows) / size)
    source = batches.Source(rows, size, steps, seed)
    found = [source[step] for step in range(steps)]
    for batch in found:
        assert {(x.shape, x.dtype.name) for x in batch.values()} == {((size, length), 'int32')}
        np.testing.assert_array_equal(batch['targets'], batch['inputs'] + 1)
    inputs = np.concatenate([batch['inputs'] for batch in found])
    for i in range(2):
        own = inputs[i * len(rows) : (i + 1) * len(rows)]
        np.testing.assert_array_equal(np.sort(own.ravel()), np.arange(len(rows) * length))


@hypothesis.given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=5), length=st.integers(1, 5)
)
def test_rows_of_streams_follow_each_other(counts, length):
    """And none goes on from one stream into the next."""
    streams = [100 * i + np.arange(count) for i, count in enumerate(counts)]
    alone = [stream for stream in streams if len(stream) > length]
    if not alone:
        of_parts = ' in the longest of its parts' if len(counts) > 1 else ''
        with pytest.raises(
            ValueError, match=f'the train text has {max(counts)} tokens{of_parts};'
        ):
            batches.Rows(streams, length, 'train')
        return
    rows = batches.Rows(streams, length, 'train')
    expected = [row for own in alone for row in batches.Rows([own], length, 'train')]
    assert len(rows) == len(expected)
    assert same([rows[i] for i in range(len(rows))], expected)
    with pytest.raises(IndexError):
        rows[len(rows)]


def same(first, second):
    first, second = list(first), list(second)
    return len(first) == len(second) and all(
        np.array_equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a
    )


def test_batches_hang_on_seed_and_step_alone():
    def stream(**changes):
        keywords = {'size': 4, 'steps': 20, 'seed': 0, **changes}
        return batches.stream(batches.Source(rows_of(101, 2), **keywords), 50)

    whole = list(stream().batches(0))
    assert len(whole) == stream().steps_per_epoch == 20
    for step in (0, 1, 12, 19):
        assert same(stream().batches(step), whole[step:])
    assert same(list(stream(steps=30).batches(0))[:20], whole)
    orders = [
        np.concatenate([b['inputs'][:, 0] for b in stream(seed=seed, steps=25).batches(0)])
        for seed in (0, 1)
    ]
    passes = [order[i : i + 50].tolist() for order in orders for i in (0, 50)]
    assert len({tuple(order) for order in passes} | {tuple(sorted(passes[0]))}) == 5


def test_processes_read_parts_of_each_batch():
    whole = batches.Source(rows_of(101, 2), 6, 20, 0)
    parts = [batches.Source(rows_of(101, 2), 6, 20, 0, i, 3) for i in range(3)]
    for step in range(20):
        own = [part[step] for part in parts]
        assert {part.shape['inputs'].shape for part in parts} == {(2, 2)}
        for name in ('inputs', 'targets'):
            together = np.concatenate([part[name] for part in own])
            np.testing.assert_array_equal(together, whole[step][name])
    with pytest.raises(ValueError, match='multiple of the 4 processes, got 6'):
        batches.Source(rows_of(101, 2), 6, 20, 0, 0, 4)


@pytest.mark.parametrize(('size', 'count'), [(4, 0), (4, 2), (4, 100), (7, 1), (30, 0)])
def test_rows_of_an_evaluation(size, count):
    """All of them, or some evenly apart; none twice, but for those without a weight."""
    held = batches.held(rows_of(51, 2), size, count)
    assert len(held) == (min(count, math.ceil(25 / size)) or math.ceil(25 / size))
    assert {batch['inputs'].shape for batch in held} == {(size, 2)}
    seen = collections.Counter()
    for batch in held:
        seen.update(batch['inputs'][batch['weights'] > 0, 0].tolist())
    number = min(count * size or 25, 25)
    assert sorted(seen) == [2 * (i * 25 // number) for i in range(number)]
    assert set(seen.values()) == {1}

"""Tokens on disk: as they are in memory, in whatever parts; what is refused; the command."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import tasks, train
from experiments.tasks.language_model import batches, reading, stored, tokens
from tests.experiments.small import config_of, lines, small_task, without_clock
from tests.experiments.test_drivers import main
from tests.experiments.test_language_model_data import SIZE, folder_of

pytest.importorskip('sentencepiece')

TASK = 'configs/tasks/language_model.py'


def lm(**changes):
    return small_task('language_model', **changes)


def of_pieces(**changes):
    return lm(tokenizer='sentencepiece', vocab_size=SIZE, **changes)


def write(folder, config, count=1, indices=None):
    """Some parts of a config's text; all by default."""
    documents = reading.of(config, None)
    how = config.tokenizer, config.vocab_size, '', documents.train
    tokenizer = tokens.make(*how, stored.kept(folder))
    tokenizer = tokens.make(*how, stored.publish(folder, tokenizer.model))
    for index in range(count) if indices is None else indices:
        text = reading.identity(config, None)
        stored.write(folder, text, documents, config.tokenizer, tokenizer, index, count)
    return documents, tokenizer


def names(folder):
    """The files that are there, tokens aside."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != '.bin')


def bins(folder):
    return len(list(folder.glob('*.bin')))


def from_disk(config, folder, **changes):
    made = config.copy_and_resolve_references()
    made.update(source='tokens', files=(str(folder),), **changes)
    return made


@pytest.mark.parametrize('count', [1, 3, 9])
@pytest.mark.parametrize('make', [lm, of_pieces])
def test_parts_are_the_text(make, count, tmp_path):
    """But for the end of a document that each begins with; more parts than documents are 8."""
    documents, tokenizer = write(tmp_path, make(), count)
    held = stored.load(tmp_path, make().tokenizer)
    held.check(make().tokenizer, tokenizer)
    streams = held.streams
    assert bins(tmp_path) == 2 * count
    for split, own in documents._asdict().items():
        assert {type(stream) for stream in streams[split]} == {np.memmap}
        assert {int(stream[0]) for stream in streams[split]} == {tokenizer.end}
        joined = [streams[split][0], *(stream[1:] for stream in streams[split][1:])]
        np.testing.assert_array_equal(np.concatenate(joined), batches.pack(own, tokenizer))


def test_a_run_from_disk_is_that_from_memory(tmp_path):
    """To the bit, with its tokenizer kept; and of several parts it has as many rows, or fewer."""
    write(tmp_path / 'one', of_pieces())
    write(tmp_path / 'three', of_pieces(), 3)
    logs = []
    for name, config in (
        ('memory', of_pieces()),
        ('disk', from_disk(of_pieces(), tmp_path / 'one')),
        ('parts', from_disk(of_pieces(), tmp_path / 'three')),
    ):
        adam = config_of('optimizers', 'adam')
        train.train_and_evaluate(config, adam, tmp_path / name, progress=False)
        logs.append(without_clock(lines(tmp_path / name)))
        assert (tmp_path / name / 'tokenizer.model').exists()
    assert logs[0] == logs[1] != logs[2]
    numbers = [
        tasks.make(config, None).num_train
        for config in (of_pieces(), from_disk(of_pieces(), tmp_path / 'three'))
    ]
    assert numbers[0] - 3 <= numbers[1] <= numbers[0]


def test_a_run_reads_its_own_rows_alone(monkeypatch, tmp_path):
    write(tmp_path, lm(), 2)
    config = from_disk(lm(evaluate_batches=1), tmp_path)
    monkeypatch.setattr(reading, 'of', lambda *_: pytest.fail('the text was read'))
    monkeypatch.setattr(tokens.Bytes, 'encode', lambda *_: pytest.fail('it was tokenised'))
    train_stream = tasks.make(config, None).stream
    asked, real = [], batches.Rows.__getitem__
    monkeypatch.setattr(
        batches.Rows, '__getitem__', lambda rows, i: asked.append(int(i)) or real(rows, i)
    )
    whole = next(train_stream.batches(3))
    assert whole['inputs'].shape == (64, 8)
    # Threads read ahead, up to the run's end.
    assert len(asked) == len(set(asked)) == 64


def test_processes_read_parts_of_each_batch(tmp_path):
    write(tmp_path, lm(), 3)
    rows = batches.Rows(stored.load(tmp_path, 'bytes').streams['train'], 8, 'train')
    whole = batches.Source(rows, 6, 5, seed=0)
    halves = [batches.Source(rows, 6, 5, 0, i, 2) for i in range(2)]
    for step in range(5):
        own = [half[step]['inputs'] for half in halves]
        np.testing.assert_array_equal(np.concatenate(own), whole[step]['inputs'])


def test_a_part_is_made_once_and_whole(monkeypatch, tmp_path):
    """One that was cut off is made again, and leaves nothing if it could."""
    encode, calls = tokens.Bytes.encode, []

    def failing(self, text):
        calls.append(text)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, text)

    monkeypatch.setattr(tokens.Bytes, 'encode', failing)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, lm(), 2, [0])
    assert (names(tmp_path), bins(tmp_path)) == ([], 0)
    write(tmp_path, lm(), 2)
    made = len(calls)
    assert (names(tmp_path), bins(tmp_path)) == (['0_of_2.json', '1_of_2.json'], 4)
    write(tmp_path, lm(), 2)
    assert len(calls) == made


def test_what_a_kill_leaves_is_in_no_one_s_way(tmp_path):
    for name in ('0_of_2.train.abc.bin', '0_of_2.abc.begun', 'tokenizer.model.abc.begun'):
        (tmp_path / name).write_bytes(b'1')
    write(tmp_path, of_pieces(), 2)
    stored.load(tmp_path, 'sentencepiece')
    assert bins(tmp_path) == 5


def test_two_processes_may_make_one_part(monkeypatch, tmp_path):
    """The one that is through later leaves what is there."""
    real = stored._tokens

    def overtaken(*args):
        monkeypatch.setattr(stored, '_tokens', real)
        write(tmp_path, lm())
        return real(*args)

    monkeypatch.setattr(stored, '_tokens', overtaken)
    write(tmp_path, lm())
    assert (names(tmp_path), bins(tmp_path)) == (['0_of_1.json'], 2)
    stored.load(tmp_path, 'bytes')


def test_of_two_tokenizers_at_once_one_stays(monkeypatch, tmp_path):
    def overtaken(begun, file):
        file.write_bytes(b'first')
        raise FileExistsError

    monkeypatch.setattr(stored.os, 'link', overtaken)
    assert stored.publish(tmp_path, b'second') == stored.kept(tmp_path) == b'first'


@pytest.mark.parametrize('linked', [True, False])
def test_the_first_tokenizer_stays(linked, monkeypatch, tmp_path):
    """Where there are no links, too."""
    if not linked:
        monkeypatch.setattr(stored.os, 'link', lambda *_: (_ for _ in ()).throw(OSError))
    assert stored.publish(tmp_path / 'new', b'first') == b'first'
    assert stored.publish(tmp_path / 'new', b'second') == b'first'
    assert names(tmp_path / 'new') == ['tokenizer.model']
    assert stored.publish(tmp_path / 'none', b'') == b''


def test_a_tokenizer_that_is_gone_comes_back(tmp_path):
    _, tokenizer = write(tmp_path, of_pieces(), 2)
    (tmp_path / 'tokenizer.model').unlink()
    with pytest.raises(FileNotFoundError, match=r'no tokenizer.model; `.*prepare_text` puts it'):
        tasks.make(from_disk(of_pieces(), tmp_path), None)
    write(tmp_path, of_pieces(), 2, [0])
    assert stored.kept(tmp_path) == tokenizer.model
    tasks.make(from_disk(of_pieces(), tmp_path), None)


def test_parts_of_another_text_are_refused(tmp_path):
    write(tmp_path, lm(), 2, [0])
    for changes, count, message in (
        (dict(validation_fraction=0.1), 2, r'0_of_2.json: task.validation_fraction is 0.02 there'),
        (dict(), 3, r'0_of_2.json: parts is 2 there, 3 here; .* by the same flags'),
        (dict(tokenizer='sentencepiece', vocab_size=SIZE), 2, "task.tokenizer is 'bytes' there"),
    ):
        with pytest.raises(ValueError, match=message):
            write(tmp_path, lm(**changes), count, [1])
    other = tmp_path / 'other'
    write(other, lm(validation_fraction=0.1), 2, [1])
    for file in other.iterdir():
        shutil.copy(file, tmp_path)
    with pytest.raises(ValueError, match=r'1_of_2.json: task.validation_fraction is 0.1 there'):
        stored.load(tmp_path, 'bytes')


def test_parts_of_another_list_of_files_are_refused(tmp_path):
    """A file more, or one that is longer now: documents would come twice, or not at all."""
    texts = tmp_path / 'texts'
    texts.mkdir()
    folder_of(texts, a='a' * 99, b='b' * 99)
    config = lm(source='text', files=(str(texts),))
    write(tmp_path / 'out', config, 2, [0])
    reading.load.cache_clear()
    folder_of(texts, b='b' * 100)
    with pytest.raises(ValueError, match=r'0_of_2.json: files is .* there'):
        write(tmp_path / 'out', config, 2, [1])
    folder_of(texts, b='b' * 99, c='c')
    with pytest.raises(ValueError, match=r'0_of_2.json: files is .* there'):
        write(tmp_path / 'out', config, 2, [1])


def test_what_a_run_refuses(tmp_path):
    with pytest.raises(ValueError, match=r'needs task.files to be one folder, .* got \(\)'):
        tasks.make(lm(source='tokens', files=()), None)
    with pytest.raises(ValueError, match=r'evaluate_batches must be an integer >= 1 with .*got 0'):
        tasks.make(from_disk(lm(), tmp_path, evaluate_batches=0), None)
    config = from_disk(of_pieces(), tmp_path)
    with pytest.raises(FileNotFoundError, match=r'no parts of a text, as `python -m exp'):
        tasks.make(config, None)
    write(tmp_path, of_pieces(), 4, [0, 2])
    with pytest.raises(FileNotFoundError, match=r'of 4 parts there are no \[1, 3\]'):
        tasks.make(config, None)
    write(tmp_path, of_pieces(), 4)
    with pytest.raises(ValueError, match=r"tokenizer is 'sentencepiece' there, 'bytes' in this"):
        tasks.make(from_disk(of_pieces(), tmp_path, tokenizer='bytes'), None)
    with pytest.raises(ValueError, match=f'task.vocab_size must be at least {SIZE}, .* got 300'):
        tasks.make(from_disk(of_pieces(), tmp_path, vocab_size=300), None)
    other = tmp_path / 'other.model'
    other.write_bytes(tokens.train(reading.of(lm(), None).train, SIZE - 20))
    with pytest.raises(ValueError, match=r'other.model is not the model that the run began with'):
        tasks.make(from_disk(of_pieces(), tmp_path, tokenizer_path=str(other)), None)
    workdir = tmp_path / 'workdir'
    workdir.mkdir()
    shutil.copy(other, workdir / 'tokenizer.model')
    with pytest.raises(ValueError, match=r'tokenizer.model is .* there, .* in this run'):
        tasks.make(config, None, workdir)
    (file,) = tmp_path.glob('3_of_4.train.*.bin')
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(
        ValueError, match=r'bin has \d+ bytes, \d+ tokens of 2 were .* 3_of_4.json'
    ):
        tasks.make(config, None)
    (tmp_path / '0_of_4.json').write_text('{}')
    with pytest.raises(ValueError, match=r'0_of_4.json does not tell of a part of a text'):
        tasks.make(config, None)


def test_the_command(tmp_path):
    """A part by each call, the tokenizer by the first one; then a run below --data_dir."""
    flags = [
        f'--task={TASK}', '--task.source=synthetic', '--task.tokenizer=sentencepiece',
        f'--task.vocab_size={SIZE}', f'--out={tmp_path}/text',
    ]  # fmt: skip
    told = [main(*flags, f'--part={i}/2', module='prepare_text') for i in range(2)]
    assert [each.returncode for each in told] == [0, 0], told[0].stderr + told[1].stderr
    documents, tokenizer = write(tmp_path / 'here', of_pieces(), 2)
    for i, each in enumerate(told):
        assert json.loads(each.stdout) == {
            split: len(batches.pack(own.part(i, 2), tokenizer))
            for split, own in documents._asdict().items()
        }
    task = tasks.make(from_disk(of_pieces(), 'text'), str(tmp_path))
    batch = next(task.stream.batches(0))
    assert jnp.isfinite(task.loss(task.init(jax.random.key(0)), batch))
    wrong = main(*flags, '--part=2/2', module='prepare_text')
    assert 'error: --part must be as 0/1 or 3/64, with 3 < 64, got ' in wrong.stderr
    wrong = main(*flags, '--task.source=tokens', module='prepare_text')
    assert 'error: a text is prepared of a language model, with task.source one of' in wrong.stderr

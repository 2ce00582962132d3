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
from tests.experiments.test_language_model_data import SIZE

pytest.importorskip('sentencepiece')

TASK = 'configs/tasks/language_model.py'


def lm(**changes):
    return small_task('language_model', **changes)


def of_pieces(**changes):
    return lm(tokenizer='sentencepiece', vocab_size=SIZE, **changes)


def write(folder, config, count=1, indices=None):
    """Some parts of a config's text; all by default."""
    documents = reading.of(config, None)
    tokenizer = tokens.make(
        config.tokenizer, config.vocab_size, '', documents.train, stored.kept(folder)
    )
    for index in range(count) if indices is None else indices:
        stored.write(folder, config, documents, config.tokenizer, tokenizer, index, count)
    return documents, tokenizer


def from_disk(config, folder, **changes):
    made = config.copy_and_resolve_references()
    made.update(source='tokens', files=(str(folder),), **changes)
    return made


@pytest.mark.parametrize('count', [1, 3, 9])
@pytest.mark.parametrize('make', [lm, of_pieces])
def test_parts_are_the_text(make, count, tmp_path):
    """But for the end of a document that each begins with; more parts than documents are 8."""
    documents, tokenizer = write(tmp_path, make(), count)
    streams = stored.load(tmp_path, make().tokenizer, tokenizer)
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


def test_a_part_is_made_once_and_whole(monkeypatch, tmp_path):
    """One that was cut off is made again; nothing of it stays."""
    encode, calls = tokens.Bytes.encode, []

    def failing(self, text):
        calls.append(text)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, text)

    monkeypatch.setattr(tokens.Bytes, 'encode', failing)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, lm(), 2, [0])
    assert list(tmp_path.iterdir()) == []
    write(tmp_path, lm(), 2)
    made = len(calls)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['0_of_2', '1_of_2']
    write(tmp_path, lm(), 2)
    assert len(calls) == made


def test_two_processes_may_make_one_part(monkeypatch, tmp_path):
    """The one that is through later leaves what is there."""
    real = stored._tokens

    def overtaken(*args):
        monkeypatch.setattr(stored, '_tokens', real)
        monkeypatch.setattr(stored.os, 'getpid', lambda: 1)
        write(tmp_path, lm())
        return real(*args)

    monkeypatch.setattr(stored, '_tokens', overtaken)
    write(tmp_path, lm())
    assert [path.name for path in tmp_path.iterdir()] == ['0_of_1']


def test_parts_of_another_text_are_refused(tmp_path):
    write(tmp_path, lm(), 2, [0])
    for changes, count, message in (
        (dict(validation_fraction=0.1), 2, r'0_of_2: task.validation_fraction is 0.02 there, 0.1'),
        (dict(), 3, r'0_of_2: parts is 2 there, 3 here; .* by the same flags'),
        (dict(tokenizer='sentencepiece', vocab_size=SIZE), 2, "task.tokenizer is 'bytes' there"),
    ):
        with pytest.raises(ValueError, match=message):
            write(tmp_path, lm(**changes), count, [1])
    other = tmp_path / 'other'
    write(other, lm(validation_fraction=0.1), 2, [1])
    shutil.move(other / '1_of_2', tmp_path / '1_of_2')
    with pytest.raises(ValueError, match=r'1_of_2: task.validation_fraction is 0.1 there, 0.02'):
        stored.load(tmp_path, 'bytes', tokens.Bytes())


def test_what_a_run_refuses(tmp_path):
    with pytest.raises(ValueError, match=r'needs task.files to be one folder, .* got \(\)'):
        tasks.make(lm(source='tokens', files=()), None)
    with pytest.raises(FileNotFoundError, match=r'no parts of a text, as `python -m exp'):
        tasks.make(from_disk(lm(), tmp_path), None)
    write(tmp_path, of_pieces(), 4, [0, 2])
    config = from_disk(of_pieces(), tmp_path)
    with pytest.raises(FileNotFoundError, match=r'of 4 parts there are no \[1, 3\]'):
        tasks.make(config, None)
    write(tmp_path, of_pieces(), 4)
    with pytest.raises(ValueError, match=r"tokenizer is 'sentencepiece' there, 'bytes' in this"):
        tasks.make(from_disk(of_pieces(), tmp_path, tokenizer='bytes'), None)
    with pytest.raises(ValueError, match=f'task.vocab_size must be at least {SIZE}, .* got 300'):
        tasks.make(from_disk(of_pieces(), tmp_path, vocab_size=300), None)
    other = tmp_path / 'other.model'
    other.write_bytes(tokens.train(reading.of(lm(), None).train, SIZE - 20))
    with pytest.raises(ValueError, match=r'tokenizer.model is .* there, .* in this run'):
        tasks.make(from_disk(of_pieces(), tmp_path, tokenizer_path=str(other)), None)
    file = tmp_path / '3_of_4' / 'train.bin'
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r'3_of_4/train.bin has \d+ tokens, \d+ were written'):
        tasks.make(config, None)
    (tmp_path / '0_of_4' / 'part.json').write_text('{}')
    with pytest.raises(ValueError, match=r'part.json does not tell of a part of a text'):
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

"""The language model as a task: what it evaluates, refuses, keeps and resumes."""

import json
import math
import signal

import jax
import numpy as np
import pytest

from configs.tasks import language_model as config
from experiments import program, report, segments, tasks, telemetry, train
from experiments.tasks import language_model as task_lib
from experiments.tasks.language_model import batches, loss, model, reading, tokens
from tests.experiments.small import config_of, lines, small_task, without_clock
from tests.experiments.test_drivers import main
from tests.experiments.test_language_model_data import SIZE, folder_of
from tests.experiments.test_language_model_stored import write
from tests.experiments.test_trainer_processes import Two, assert_same_curve

pytest.importorskip('sentencepiece')


# Tasks.


def lm(**changes):
    return small_task('language_model', **changes)


def test_task_s_numbers(tmp_path):
    root = folder_of(tmp_path, a='abcdefghij' * 20, b='klm' * 40)
    files = dict(source='text', files=('*.txt',), validation_fraction=0.1)
    task = tasks.make(lm(**files, batch_size=3, steps=5), root)
    # Two documents between three ends; a token more than the rows' own.
    assert task.num_train == (180 + 108 + 3 - 1) // 8
    assert (task.num_steps, task.steps_per_epoch, task.epochs) == (5, 5, 1)
    assert task.tokens_per_step == 24
    assert task.flops_per_token == model.flops_per_token(task_lib.sizes(lm()), 8)
    assert list(task.artifacts) == ['text.json'], 'no tokenizer: its tokens are bytes'
    params = jax.eval_shape(task.init, jax.random.key(0))
    names = jax.tree.map(len, task.logical_axes, is_leaf=lambda x: isinstance(x, tuple))
    assert names == jax.tree.map(lambda x: len(x.shape), params)


def test_tokenizer_is_an_artifact():
    task = tasks.make(lm(tokenizer='sentencepiece', vocab_size=SIZE), None)
    documents = reading.load('synthetic', validation_fraction=0.02)
    assert task.artifacts['tokenizer.model'] == tokens.train(documents.train, SIZE)


def test_a_run_does_not_go_on_with_another_text(tmp_path):
    """Not even with one as long; where it lies does not matter."""
    made = lm(source='text', files=('*.txt',), validation_fraction=0.1, batch_size=8)
    adam, roots = config_of('optimizers', 'adam'), []
    for name, text in (('one', 'abcdefghij'), ('moved', 'abcdefghij'), ('other', 'abcdefghiJ')):
        (tmp_path / name).mkdir()
        roots.append(folder_of(tmp_path / name, a=text * 20, b='klm' * 40))
    for root in roots[:2]:
        with train.prepare(made, adam, tmp_path / 'run', root).run:
            pass
    held = json.loads((tmp_path / 'run/text.json').read_text())
    assert held['rows']['train'] == (180 + 108 + 3 - 1) // 8
    with pytest.raises(ValueError, match=r'text.json is not what the data give now'):
        train.prepare(made, adam, tmp_path / 'run', roots[2])


def test_evaluation_is_that_of_all_rows():
    """Against one row at a time; bits per byte from the bytes of the text itself."""
    made = lm(
        evaluate_batches=0, batch_size=16, tokenizer='sentencepiece', vocab_size=SIZE, z_loss=0.1
    )
    task = tasks.make(made, None)
    params = task.init(jax.random.key(3))
    documents = reading.load('synthetic', validation_fraction=0.02).validation
    tokenizer = tokens.SentencePiece(task.artifacts['tokenizer.model'])
    stream = batches.pack(documents, tokenizer)
    call, nats = jax.jit(model.forward(task_lib.sizes(made))), []
    used = (len(stream) - 1) // 8 * 8
    for i in range(0, used, 8):
        logits = np.float64(call(params, stream[None, i : i + 8].astype(np.int32))[0])
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        nats += [-np.log(p[t, stream[i + t + 1]]) for t in range(8)]
    text = tokenizer.decode(int(t) for t in stream[1 : used + 1] if t != tokenizer.end)
    found = {name: float(value) for name, value in task.evaluate(params).items()}
    assert found['validation_loss'] == pytest.approx(np.mean(nats), rel=1e-5)
    assert found['validation_perplexity'] == pytest.approx(np.exp(np.mean(nats)), rel=1e-5)
    bits = sum(nats) / len(text.encode()) / math.log(2)
    assert found['validation_bits_per_byte'] == pytest.approx(bits, rel=1e-5)
    assert set(task.validate(params)) == set(found) - {'train_loss'}
    assert found['train_loss'] == pytest.approx(np.mean(nats), rel=0.1)
    batch = next(task.stream.batches(0))
    assert task.loss(params, batch) > found['train_loss'] + 0.1 * 20, 'z-loss is in the loss'


@pytest.mark.parametrize('count', [0, 1, 2])
def test_evaluation_in_microbatches_is_that_of_whole_batches(count, monkeypatch):
    """The same rows, and no more of them at once than in a step of training."""
    rows, found = [], []
    real = loss.sums

    def sums(logits, *args):
        rows.append(logits.shape[0])
        return real(logits, *args)

    monkeypatch.setattr(loss, 'sums', sums)
    for accumulation in (1, 4):
        task = tasks.make(lm(evaluate_batches=count, accumulation=accumulation), None)
        found.append(task.evaluate(task.init(jax.random.key(3))))
    assert rows == [64, 16]
    for name, value in found[0].items():
        assert float(found[1][name]) == pytest.approx(float(value), rel=1e-5), name


def test_a_run_that_goes_on_has_its_tokenizer(monkeypatch, tmp_path):
    made = lm(tokenizer='sentencepiece', vocab_size=SIZE)
    first = task_lib.make_task(made, None, tmp_path)
    (tmp_path / 'tokenizer.model').write_bytes(first.artifacts['tokenizer.model'])
    tokens.make.cache_clear()
    monkeypatch.setattr(tokens, 'train', lambda *_: pytest.fail('trained again'))
    assert task_lib.make_task(made, None, tmp_path).artifacts == first.artifacts
    other = tmp_path / 'other.model'
    other.write_bytes(b'another')
    made.tokenizer_path = str(other)
    with pytest.raises(ValueError, match=r'other.model is not the model that the run began with'):
        task_lib.make_task(made, None, tmp_path)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(source='mnist'), r"task.source must be one of .*, got 'mnist'"),
        (dict(source='text', files=()), r'task.files must be one file or more'),
        (dict(source='tfds', tfds_name=''), 'needs task.tfds_name'),
        (dict(source='tfds', tfds_splits=('a', 'b', 'c')), 'one or two task.tfds_splits'),
        (dict(validation_fraction=1.0), r'task.validation_fraction must be in \(0, 1\), got 1.0'),
        (dict(length=10_000), r'the validation text has \d+ tokens; a row of task.length=10000'),
        (dict(length=20_000), r'the train text has 15\d+ tokens; .* need 20001'),
        (dict(tokenizer='words'), r"task.tokenizer must be one of .*, got 'words'"),
        (dict(vocab_size=256), 'task.vocab_size must be at least 257, .* got 256'),
        (dict(tokenizer='sentencepiece', vocab_size=200), r'no SentencePiece model with .*=200'),
        (dict(tokenizer='sentencepiece', vocab_size=99_999), r'model with .*=99999 .*too high'),
        (dict(heads=3), 'task.width must be an even multiple of task.heads, .* got 8, 3 and 1'),
        (dict(kv_heads=3), 'task.heads a multiple of task.kv_heads, got 8, 2 and 3'),
        (dict(accumulation=3), 'task.batch_size must be a multiple of .*, got 64 and 3'),
        (dict(batch_size=0), 'task.batch_size must be an integer >= 1, got 0'),
        (dict(steps=0), 'task.steps must be an integer >= 1, got 0'),
        (dict(evaluate_batches=-1), 'task.evaluate_batches must be an integer >= 0, got -1'),
        (dict(remat='some'), r"task.remat must be one of .*, got 'some'"),
        (dict(attention='flash'), r"task.attention must be one of .*, got 'flash'"),
        (dict(compute_dtype='float16'), r"task.compute_dtype must be one of .*, got 'float16'"),
        (dict(warmup_steps=5), r'task.warmup_steps must be in \[0, task.steps = 4\], got 5'),
        (dict(decay='step'), r"task.decay must be one of .*, got 'step'"),
        (dict(final_fraction=2.0), r'task.final_fraction must be in \[0, 1\], got 2.0'),
        (dict(z_loss=-1.0), r'task.z_loss must be a number >= 0, got -1.0'),
        (dict(rotary_base=1.0), r'task.rotary_base must be above 1, got 1.0'),
        (dict(checkpoint_every_steps=0), 'task.checkpoint_every_steps must be an integer >= 1'),
    ],
)
def test_bad_config(changes, message):
    with pytest.raises(ValueError, match=message):
        train.check(lm(**changes), config_of('optimizers', 'adam'))


# Runs.


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A run's task, its folder and its summary."""
    task = lm(steps=6, batch_size=8, mask_documents=True)
    folder = tmp_path_factory.mktemp('whole')
    adam = config_of('optimizers', 'adam')
    return task, folder, train.train_and_evaluate(task, adam, folder, progress=False)


def test_resumed_run_is_the_same_bit_for_bit(whole, tmp_path):
    task, folder, summary = whole
    adam = config_of('optimizers', 'adam')
    assert train.train_and_evaluate(task, adam, tmp_path, progress=False, stop_after=3)
    resumed = train.train_and_evaluate(task, adam, tmp_path, progress=False)
    assert without_clock([resumed]) == without_clock([summary])
    assert without_clock(lines(tmp_path)) == without_clock(lines(folder))


def test_a_resumed_run_does_not_train_its_tokenizer_again(monkeypatch, tmp_path):
    made, adam = lm(tokenizer='sentencepiece', vocab_size=SIZE), config_of('optimizers', 'adam')
    train.train_and_evaluate(made, adam, tmp_path, progress=False, stop_after=2)
    tokens.make.cache_clear()
    monkeypatch.setattr(tokens, 'train', lambda *_: pytest.fail('trained again'))
    assert 'validation_loss' in train.train_and_evaluate(made, adam, tmp_path, progress=False)


def test_what_a_run_tells(whole):
    _, folder, summary = whole
    assert summary['tokens_seen'] == 6 * 8 * 8
    assert summary['passes'] == pytest.approx(384 / summary['train_tokens'])
    assert [row['step'] for row in lines(folder) if 'validation_loss' in row] == [2, 4, 6]
    assert lines(folder)[-1]['validation_loss'] == summary['validation_loss']


def test_adamw_s_search_has_the_decays_of_language_models():
    axis = config_of('optimizers', 'adamw').search_space.weight_decay
    assert axis.low < 0.01 < 0.1 < axis.high


def test_loss_falls(tmp_path):
    """On made-up text: from ln 264 = 5.6 to below that of single letters."""
    task = lm(width=32, mlp=64, length=16, batch_size=16, steps=60, log_every=5)
    adam = config_of('optimizers', 'adam')
    adam.learning_rate = 1e-2
    summary = train.train_and_evaluate(task, adam, tmp_path, progress=False)
    assert lines(tmp_path)[0]['loss'] > 3.5
    assert summary['validation_loss'] < 2.2


@pytest.mark.slow
def test_size_after_a_colon(tmp_path):
    arguments = ('--optimizer=configs/optimizers/adam.py', f'--workdir={tmp_path / "run"}')
    tiny = '--task=configs/tasks/language_model.py:tiny'
    done = main(
        tiny, '--task.source=synthetic', '--task.steps=2', '--task.warmup_steps=1', *arguments
    )
    assert '"num_params": 131456' in done.stdout, done.stderr
    done = main('--task=configs/tasks/language_model.py:2b', *arguments)
    assert done.returncode != 0
    assert "the sizes of the language model are ['tiny'," in done.stderr


def test_report_has_the_validation_loss(tmp_path):
    made = lm(steps=2, warmup_steps=1)
    summary = train.train_and_evaluate(
        made, config_of('optimizers', 'adam'), tmp_path / 'run', progress=False
    )
    text = report.report([str(tmp_path / 'run')], str(tmp_path / 'report'))
    header, _, row = text.splitlines()[:3]
    assert [cell.strip() for cell in header.split('|')[2:4]] == ['train loss', 'validation loss']
    assert row.split('|')[3].strip() == f'{summary["validation_loss"]:.3f}'


# Real data.


@pytest.mark.slow
@pytest.mark.usefixtures('optimized')
@pytest.mark.parametrize(
    ('name', 'peak'),
    [
        ('sonew', 3e-3),
        ('adamw', 3e-3),
        ('adafactor', 3e-2),
        ('shared_basis', 3e-3),
        ('muon', 1e-2),
    ],
)
def test_real_text(name, peak, data_dir):
    """Thirty steps of `tiny` on tinyshakespeare, from ln 384 = 6 to below 4 nats."""
    task_config, optimizer = config.get_config('tiny'), config_of('optimizers', name)
    task_config.update(steps=30, warmup_steps=5)
    optimizer.learning_rate = peak
    task = tasks.make(task_config, data_dir)
    tx = program.make_tx(task, task_config, optimizer)
    carry = program.initial(task, tx, 0)
    taking = segments.make(task, program.make_step(task, tx), 0)
    taking.compile(carry, [30])
    losses = taking(carry, 0, 30, telemetry.Watch())[1]['loss']
    assert losses[0] > 5.5
    assert np.mean(losses[-5:]) < 4.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ('mesh', 'optimizer'),
    [
        ('2,2,2', 'adamw'),
        ('2,2,2', 'sonew'),
        ('2,2,2', 'shared_basis'),
        ('1,4,2', 'adafactor'),
    ],
)
def test_two_processes_equal_one_device(mesh, optimizer, tmp_path):
    """The smallest size on two processes with four devices each; one device has no mesh."""
    changes = dict(source='synthetic', compute_dtype='float32', steps=6, warmup_steps=2)
    changes |= dict(log_every=1, checkpoint_every_steps=3, evaluate_every_steps=3)
    flags = ['--task=configs/tasks/language_model.py:tiny']
    flags += [f'--task.{name}={value}' for name, value in changes.items()]
    flags += [f'--optimizer=configs/optimizers/{optimizer}.py']
    with Two(tmp_path / 'two', *flags, f'--mesh={mesh}', module='experiments.main') as run:
        assert run.codes() == [0, 0], run.told()
    made = config.get_config('tiny')
    made.update(changes, mesh=dict(data=1, fsdp=1, tensor=1))
    one_device = [jax.devices()[0]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, 'devices', lambda *_: one_device)
        train.train_and_evaluate(
            made, config_of('optimizers', optimizer), tmp_path / 'one', progress=False
        )
    assert_same_curve(tmp_path / 'two', tmp_path / 'one')
    rows = lines(tmp_path / 'two')
    expected = lines(tmp_path / 'one')
    for name in ('grad_norm', 'validation_loss'):
        got, wanted = ([row[name] for row in log if name in row] for log in (rows, expected))
        np.testing.assert_allclose(got, wanted, rtol=1e-3, err_msg=name)


@pytest.mark.slow
def test_first_process_killed_and_resumed_on_another_mesh(tmp_path):
    """With the tokens of SentencePiece from the disk, which threads read ahead."""
    made = config.get_config('tiny')
    made.update(source='synthetic', tokenizer='sentencepiece', vocab_size=SIZE)
    write(tmp_path / 'tokens', made, count=2)
    changes = dict(source='tokens', tokenizer='sentencepiece', vocab_size=SIZE, length=16)
    changes |= dict(compute_dtype='float32', steps=40, warmup_steps=2)
    changes |= dict(log_every=2, checkpoint_every_steps=4, evaluate_every_steps=20)
    flags = ['--task=configs/tasks/language_model.py:tiny', f'--data_dir={tmp_path}']
    flags += [f'--task.{name}={value}' for name, value in changes.items()]
    flags += ["--task.files=('tokens',)", '--optimizer=configs/optimizers/sonew.py']
    with Two(tmp_path / 'two', *flags, '--mesh=2,2,2', module='experiments.main') as run:
        run.wait_for_row(tmp_path / 'two', 3)
        run.processes[0].send_signal(signal.SIGKILL)
        run.processes[0].wait()
    reached = len(lines(tmp_path / 'two'))
    assert 3 <= reached < 20, 'killed in the middle'
    with Two(tmp_path / 'two', *flags, '--mesh=1,4,2', module='experiments.main') as run:
        assert run.codes() == [0, 0], run.told()
    made = config.get_config('tiny')
    made.update(changes, files=('tokens',), mesh=dict(data=1, fsdp=1, tensor=1))
    one_device, sonew = [jax.devices()[0]], config_of('optimizers', 'sonew')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, 'devices', lambda *_: one_device)
        folders = (tmp_path / 'one', str(tmp_path))
        train.train_and_evaluate(made, sonew, *folders, progress=False)
    assert_same_curve(tmp_path / 'two', tmp_path / 'one')
    for name in ('text.json', 'tokenizer.model'):
        assert (tmp_path / 'two' / name).read_bytes() == (tmp_path / 'one' / name).read_bytes()

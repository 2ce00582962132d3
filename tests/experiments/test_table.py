"""A table's driver: what is run, what the cells say, what an interruption costs."""

import functools
import json
import shutil

import jax
import pytest
from matplotlib import figure, pyplot
from ml_collections import config_dict

from configs.tables import (
    autoencoder,
    autoencoder_bfloat16,
    autoencoder_sonew,
    autoencoder_sonew_long,
    language_model,
    pos_tagging,
    pos_tagging_cost,
    pos_tagging_small,
    pos_tagging_small_xpos,
)
from experiments import program, report, sweep, table, train
from tests.experiments.small import config_of, lines, small_task


@pytest.fixture
def small():
    """Three rows on a task of eight steps, and one that cannot be run."""
    task = small_task()
    names = ('source', 'hidden', 'batch_size', 'epochs', 'warmup_epochs', 'log_every')
    return config_dict.ConfigDict(
        dict(
            task='autoencoder',
            settings={name: task[name] for name in names},
            metrics=autoencoder.get_config().metrics,
            rows=dict(
                sgd=dict(optimizer='sgd'),
                adam=dict(optimizer='adam', reported=53.59, confidence='recalled'),
                band_4=dict(optimizer='sonew', settings=dict(band=4), label='SONew, band 4'),
                kfac=dict(label='K-FAC', note='cannot be had'),
            ),
        )
    )


def cells(text):
    """The table's cells by row and column, columns of one name joined."""
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) > 5}


def test_table(small, tmp_path):
    text = table.run(small, tmp_path, seeds=(0, 1))
    found = cells(text)
    ends = {
        row: [json.loads((tmp_path / row / f'seed_{s}/summary.json').read_text()) for s in (0, 1)]
        for row in ('sgd', 'adam', 'band_4')
    }
    losses = [summary['train_loss'] for summary in ends['band_4']]
    mean, half = sum(losses) / 2, abs(losses[0] - losses[1]) / 2
    assert found['SONew, band 4'][0] == f'{mean:.2f} ± {half:.2f}'
    assert found['SONew, band 4'][3] == '2'
    assert found['adam'][2] == '53.59 (recalled)'
    seconds = [sum(s['seconds'] for s in ends[row]) for row in ('sgd', 'adam')]
    assert found['sgd'][5] == f'{seconds[0] / seconds[1]:.2f}'
    bytes_ = [ends[row][0]['state_bytes'] for row in ('sgd', 'adam')]
    assert found['sgd'][7] == f'{bytes_[0] / bytes_[1]:.2f}'
    assert found['K-FAC'][0] == 'not run'
    assert 'K-FAC: cannot be had' in text
    order = [name for name in found if name in ('sgd', 'adam', 'SONew, band 4', 'K-FAC')]
    assert order[-1] == 'K-FAC'
    of = {'sgd': 'sgd', 'adam': 'adam', 'SONew, band 4': 'band_4'}
    best = sorted(of, key=lambda name: sum(s['train_loss'] for s in ends[of[name]]))
    assert order[:-1] == best
    assert (tmp_path / 'table.png').stat().st_size > 10_000
    assert len(json.loads((tmp_path / 'table.json').read_text())) == 6
    assert (tmp_path / 'table.md').read_text().strip() == text
    held = json.loads((tmp_path / 'band_4/seed_1/config.json').read_text())
    assert (held['optimizer']['band'], held['task']['seed']) == (4, 1)


def test_rows_are_added_and_none_is_run_twice(small, tmp_path, monkeypatch):
    text = table.run(small, tmp_path, rows='sgd')
    assert cells(text)['adam'][0] == 'not run'
    assert cells(text)['sgd'][5] == '', 'there is no Adam to compare with'
    before = lines(tmp_path / 'sgd/seed_0')
    text = table.run(small, tmp_path)
    assert cells(text)['sgd'][5]
    assert lines(tmp_path / 'sgd/seed_0') == before


def test_ratios_are_to_the_reference(small, tmp_path):
    small.reference = 'sgd'
    text = table.run(small, tmp_path, rows='sgd|adam')
    assert text.splitlines()[0].count('to sgd') == 3
    assert cells(text)['sgd'][5::2] == ['1.00'] * 3


def test_ratios_are_of_the_seeds_that_both_have(small, tmp_path):
    """And a search in the same folder is no seed."""
    table.run(small, tmp_path, rows='adam')
    table.run(small, tmp_path, rows='sgd', seeds=(0, 1))
    shutil.copytree(tmp_path / 'sgd/seed_1', tmp_path / 'sgd/000')
    for row, seed, value in (('adam', 0, 2.0), ('sgd', 0, 3.0), ('sgd', 1, 9.0)):
        file = tmp_path / row / f'seed_{seed}/summary.json'
        file.write_text(json.dumps(json.loads(file.read_text()) | {'seconds': value}))
    found = cells(table.write(small, tmp_path))
    assert found['sgd'][3:6] == ['2', '6', '1.50']


def test_interrupted_table_goes_on(small, tmp_path):
    configs = table.configs_of(small, 'adam', 0)
    train.train_and_evaluate(*configs, tmp_path / 'adam/seed_0', stop_after=2)
    assert cells(table.write(small, tmp_path))['adam'][0] == 'not run'
    assert cells(table.run(small, tmp_path, rows='adam'))['adam'][3] == '1'
    assert [row['step'] for row in lines(tmp_path / 'adam/seed_0')] == list(range(1, 9))


def test_ranges_of_a_row_are_in_place_of_its_config_s(small):
    """And no others beside them; likewise what else is a mapping."""
    ranges = dict(learning_rate=dict(low=1e-3, high=1e-2))
    small.rows.band_4.settings.update(search_space=ranges, schedules=dict(b2=(0.9, 0.99)))
    _, optimizer = table.configs_of(small, 'band_4', 0)
    assert optimizer.search_space.to_dict() == ranges
    assert optimizer.schedules.to_dict() == dict(b2=(0.9, 0.99))
    for rows in (pos_tagging.get_config(), pos_tagging_small.get_config()):
        _, optimizer = table.configs_of(rows, 'sonew_band_4', 0)
        assert sorted(optimizer.search_space) == ['b1', 'b2', 'learning_rate', 'relative_eps']


def test_bad_table(small, tmp_path):
    with pytest.raises(ValueError, match=r"--rows='adamant' is in none of .*'adam'"):
        table.run(small, tmp_path, rows='adamant')
    small.rows.sgd.settings = dict(b2=0.9)
    with pytest.raises(ValueError, match=r"row 'sgd': configs/optimizers/sgd.py has no \['b2'\]"):
        table.run(small, tmp_path / 'a')
    assert not (tmp_path / 'a').exists(), 'the other rows have not been run'


def test_nothing_is_run_if_a_folder_is_another_s(small, tmp_path):
    """Even of the last row."""
    task, optimizer = table.configs_of(small, 'band_4', 0)
    optimizer.b2 = 0.5
    train.prepare(task, optimizer, tmp_path / 'band_4/seed_0')
    with pytest.raises(ValueError, match=r'optimizer\.b2: 0\.5 there, 0\.9 given'):
        table.run(small, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['band_4']


def test_runs_of_other_settings_are_left_out(small, tmp_path):
    """And named: a row that was edited, a table that is longer now."""
    table.run(small, tmp_path, rows='sgd|adam', seeds=(0, 1))
    small.rows.sgd.settings = dict(momentum=0.5)
    task, optimizer = table.configs_of(small, 'sgd', 1)
    shutil.rmtree(tmp_path / 'sgd/seed_1')
    train.train_and_evaluate(task, optimizer, tmp_path / 'sgd/seed_1')
    file = tmp_path / 'adam/seed_0/config.json'
    held = json.loads(file.read_text())
    del held['task']['compute_dtype']  # as in a run of before there was one
    file.write_text(json.dumps(held | {'task': held['task'] | {'max_to_keep': 3}}))
    text = table.write(small, tmp_path)
    assert cells(text)['adam'][3] == '2'
    assert cells(text)['sgd'][3] == '1'
    why = 'is left out: its configuration is another, optimizer.momentum: 0.9 there, 0.5 given'
    assert [line for line in text.splitlines() if 'left out' in line] == [f'sgd/seed_0 {why}']
    assert len(json.loads((tmp_path / 'table.json').read_text())) == 3
    small.settings.epochs = 3
    text = table.write(small, tmp_path)
    assert cells(text)['adam'][0] == 'not run'
    assert text.count('is another, task.epochs: 2 there, 3 given') == 4


def test_a_cost_that_is_not_known_is_an_empty_cell(small, tmp_path):
    table.run(small, tmp_path, rows='sgd|adam')
    assert all(cells(table.write(small, tmp_path))['sgd'][3:])
    file = tmp_path / 'adam/seed_0/summary.json'
    summary = json.loads(file.read_text())
    del summary['state_bytes']
    file.write_text(json.dumps(summary | {'program_bytes': 0}))
    found = cells(table.write(small, tmp_path))
    assert found['adam'][6:] == ['', '', '', '']
    assert [bool(cell) for cell in found['sgd'][4:]] == [True, True, True, False, True, False]


def searched(folder, small, row, values, *, stopped=(), **search):
    """What a search of a row leaves, with these metrics, those of the stopped trials last."""
    drawn = [{'learning_rate': 10.0**-i} for i in range(1, 1 + len(values) + len(stopped))]
    trials = [
        {'trial': f'{i:03d}', 'hyperparameters': own, 'metric': value}
        for i, (own, value) in enumerate(zip(drawn, [*values, *stopped], strict=True))
    ]
    for trial in trials[len(values) :]:
        trial['stopped_at'] = 4
    for trial in trials:
        task, optimizer = table.configs_of(small, row, 0)
        optimizer.update(trial['hyperparameters'])
        train.prepare(task, optimizer, folder / row / trial['trial'])
    content = {
        'search': {'metric': search.get('metric', 'train_loss')},
        'largest': search.get('largest', False),
        'trials': trials,
    }
    (folder / row / 'sweep.json').write_text(json.dumps(content))


@pytest.fixture
def sweeps(monkeypatch):
    """In place of the sweeps: by what they would have gone."""
    metrics = []
    monkeypatch.setattr(sweep, 'sweep', lambda *given, **_: metrics.append(given[2]['metric']))
    return metrics


def rows_of(text):
    """The cells of a table, and what is below it."""
    above, _, below = text.partition('\n\n')
    lines = [line.strip('|').split('|') for line in above.splitlines()]
    return [[cell.strip() for cell in line] for line in lines if '--' not in line[0]], below


def test_best_trials_are_written(small, sweeps, tmp_path):
    """Of all rows in the folder, by the number itself."""
    searched(tmp_path, small, 'sgd', [122.63, 130.98], stopped=[50.0])
    searched(tmp_path, small, 'adam', [67.288], stopped=[70.0, None])
    searched(tmp_path, small, 'band_4', [None])
    text = table.search(small, tmp_path, rows='adam', search=config_of('searches', 'random'))
    assert sweeps == ['train_loss']
    assert (tmp_path / 'search.md').read_text() == text + '\n'
    header = ['row', 'best train loss', 'second', 'trials', 'to the end', 'settings of the best']
    assert rows_of(text)[0] == [
        header,
        ['adam', '67.29', '', '3', '1', 'learning_rate=0.1'],
        ['sgd', '122.63', '130.98', '3', '2', 'learning_rate=0.1'],
        ['band_4', 'nan', '', '1', '1', 'learning_rate=0.1'],
    ]
    small.settings.epochs = 3
    _, below = rows_of(table.search(small, tmp_path, rows='adam', search={'metric': None}))
    assert below.count('is left out: its configuration is another, task.epochs: 2 there') == 3


def test_a_search_goes_by_the_table_s_first_metric(small, sweeps, tmp_path):
    """Unless it names one; the largest is the best where the sweep says so."""
    small.metrics = (('best_dev_accuracy', 'dev %', 100.0), ('test_loss', 'test loss'))
    accuracy = dict(metric='best_dev_accuracy', largest=True)
    searched(tmp_path, small, 'sgd', [0.6712, 0.6], **accuracy)
    searched(tmp_path, small, 'adam', [0.6736], **accuracy)
    searched(tmp_path, small, 'band_4', [0.12345], metric='dev_loss')
    search = config_of('searches', 'random')
    lines, below = rows_of(table.search(small, tmp_path, search=search))
    assert lines[0][1] == 'best dev %'
    assert [line[:3] for line in lines[1:]] == [['adam', '67.36', ''], ['sgd', '67.12', '60.00']]
    assert below == 'band_4 is left out: its search went by dev_loss'
    search.metric = 'dev_loss'
    lines, _ = rows_of(table.search(small, tmp_path, rows='adam', search=search))
    assert [line[:2] for line in lines] == [['row', 'best dev loss'], ['band_4', '0.1235']]
    assert sweeps == [*['best_dev_accuracy'] * 3, 'dev_loss']


def test_finals_are_written(small, tmp_path):
    """Of all rows in the folder, beside what they were in the search."""
    short = small.copy_and_resolve_references()
    short.settings.epochs = 1
    searched(tmp_path, short, 'sgd', [122.63, 130.98])
    searched(tmp_path, short, 'adam', [67.288], stopped=[50.0])
    table.finals(small, tmp_path, rows='sgd', best=2)
    text = table.finals(small, tmp_path, rows='adam', best=2)
    assert (tmp_path / 'finals.md').read_text() == text + '\n'
    at = ('place at 1 epochs', 'train loss at 1 epochs')
    ends = ('train loss at 2 epochs', 'test loss at 2 epochs')
    (header, *lines), below = rows_of(text)
    assert header == ['row', 'trial', *at, *ends, 'settings']
    assert [line[:4] for line in lines] == [
        ['adam', '000', '1', '67.29'],
        ['adam', '001', '2', 'stopped at 4'],
        ['sgd', '000', '1', '122.63'],
        ['sgd', '001', '2', '130.98'],
    ]
    summary = json.loads((tmp_path / 'sgd/finals/001/summary.json').read_text())
    shown = [f'{summary[name]:.2f}' for name in ('train_loss', 'test_loss')]
    assert lines[3][4:] == [*shown, 'learning_rate=0.01']
    assert not below
    small.rows.sgd.settings = dict(momentum=0.5)
    lines, below = rows_of(table.finals(small, tmp_path, rows='adam', best=1))
    assert [line[0] for line in lines] == ['row', 'adam', 'adam']
    why = 'is left out: its configuration is another, optimizer.momentum: 0.9 there, 0.5 given'
    assert below.splitlines() == [f'sgd/finals/{trial} {why}' for trial in ('000', '001')]


@pytest.mark.slow
def test_search_and_finals(small, tmp_path):
    """Each row's ranges are searched with its settings, the best go the whole length."""
    small.rows.band_4.settings = dict(band=2)
    short = small.copy_and_resolve_references()
    short.settings.epochs = 1
    search = config_of('searches', 'random')
    with pytest.raises(FileNotFoundError, match='run --stage=search first'):
        table.finals(small, tmp_path, rows='band')
    text = table.search(short, tmp_path, rows='band|sgd', search=search, trials=3)
    rows = [line.split('|')[1].strip() for line in text.splitlines()[2:]]
    assert sorted(rows) == ['band_4', 'sgd']
    trials = json.loads((tmp_path / 'band_4/sweep.json').read_text())['trials']
    assert len(trials) == 3
    table.finals(small, tmp_path, rows='band', best=2)
    done = sorted(f.parent.name for f in (tmp_path / 'band_4/finals').glob('*/summary.json'))
    assert done == sorted(trial['trial'] for trial in trials[:2])
    for number in done:
        held = json.loads((tmp_path / f'band_4/finals/{number}/config.json').read_text())
        trial = next(t for t in trials if t['trial'] == number)
        assert held['task']['epochs'] == 2
        assert held['optimizer']['band'] == 2
        assert trial['hyperparameters'].items() <= held['optimizer'].items()


@pytest.mark.parametrize('unit', ['epoch', 'step'])
def test_a_figure_goes_by_epochs_where_all_runs_have_some(unit, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figure.Figure, 'savefig', lambda self, *_, **__: drawn.extend(self.axes))
    rows = [{'step': 5 * i, 'epoch': i, 'seconds': 7.0 * i, 'loss': 9.0 - i} for i in (1, 2)]
    other = [row if unit == 'epoch' else {'step': 3, 'seconds': 1.0, 'loss': 2.0} for row in rows]
    report.plot([report.Run(name, {}, log, {}) for name, log in (('a', rows), ('b', other))], '')
    assert [axes.get_xlabel() for axes in drawn] == [unit, 'seconds of training']
    assert list(drawn[0].lines[0].get_xdata()) == [row[unit] for row in rows]


@pytest.mark.parametrize('label', ['a', 'a row that has everything changed that there is: '])
def test_a_figure_of_many_runs_can_be_read(label, tmp_path, monkeypatch):
    """However many there are, the axes keep their size, free of the legend, and lines differ."""
    drawn = []

    def laid_out(self, *_, **__):
        self.draw_without_rendering()
        drawn.append(self)

    monkeypatch.setattr(figure.Figure, 'savefig', laid_out)
    rows = [{'step': i, 'epoch': i, 'seconds': 7.0 * i, 'loss': 9.0 - i} for i in (1, 2)]
    report.plot([report.Run(f'{label}{i}', {}, rows, {}) for i in range(40)], '')
    legend = drawn[0].legends[0].get_window_extent()
    for axes in drawn[0].axes:
        box = axes.get_window_extent()
        assert min(box.width / 5, box.height / 3.5) > drawn[0].dpi
        assert not box.overlaps(legend)
    assert legend.y0 >= 0
    assert legend.x1 <= drawn[0].bbox.width
    lines = {(line.get_color(), line.get_linestyle()) for line in drawn[0].axes[0].lines}
    assert len(lines) == 40


def test_a_table_sorted_by_the_largest(small, tmp_path):
    """Numbers of a group, scaled; the plot has the accuracy below the loss."""
    small.rows = {name: small.rows[name] for name in ('sgd', 'adam')}
    table.run(small, tmp_path)
    plain = pyplot.imread(tmp_path / 'table.png').shape
    small.metrics = (('best_dev_accuracy', 'dev %', 100.0), ('at_best_dev/test', 'test'))
    small.largest = True
    for row, best in (('sgd', 0.25), ('adam', 0.75)):
        file = tmp_path / row / 'seed_0/summary.json'
        numbers = {'best_dev_accuracy': best, 'at_best_dev': {'test': 2 * best}}
        file.write_text(json.dumps(json.loads(file.read_text()) | numbers))
        log = tmp_path / row / 'seed_0/metrics.jsonl'
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        log.write_text(''.join(json.dumps(r | {'dev_accuracy': best}) + '\n' for r in rows))
    text = table.write(small, tmp_path)
    header, _, first, second = text.splitlines()[:4]
    names = [cell.strip() for cell in header.strip('|').split('|')]
    assert names[:4] == ['optimizer', 'dev %', 'test', 'reported']
    assert [cell.strip() for cell in first.split('|')[1:4]] == ['adam', '75.00', '1.50']
    assert [cell.strip() for cell in second.split('|')[1:4]] == ['sgd', '25.00', '0.50']
    assert pyplot.imread(tmp_path / 'table.png').shape[0] == 2 * plain[0]
    places = {'best_dev_accuracy': 'words_alone/dev'}
    small.baseline = {'label': 'words alone', 'metrics': places}
    for row in ('sgd', 'adam'):
        file = tmp_path / row / 'seed_0/summary.json'
        held = json.loads(file.read_text()) | {'words_alone': {'dev': 0.5}}
        file.write_text(json.dumps(held))
    lines = table.write(small, tmp_path).splitlines()
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines[2:5]]
    assert [row[0] for row in rows] == ['adam', 'words alone', 'sgd']
    assert rows[1][1:] == ['50.00', *[''] * (len(names) - 2)]


COMMITTED = {
    'autoencoder': autoencoder.get_config,
    'autoencoder_bfloat16': autoencoder_bfloat16.get_config,
    'pos_tagging': pos_tagging.get_config,
    'pos_tagging_small': pos_tagging_small.get_config,
    'pos_tagging_small_xpos': pos_tagging_small_xpos.get_config,
    'language_model:tiny': functools.partial(language_model.get_config, 'tiny'),
    'language_model:small': functools.partial(language_model.get_config, 'small'),
}
SHRUNK = {
    'autoencoder': dict(batch_size=64),
    'pos_tagging': dict(batch_size=16),
    'pos_tagging_small': dict(batch_size=16),
    'language_model:tiny': dict(batch_size=8, evaluate_batches=1),
    'language_model:small': dict(
        batch_size=8, evaluate_batches=1, tokenizer='bytes', vocab_size=264
    ),
}


def committed_rows(get_config):
    """The configs of each row, on synthetic data."""
    rows = get_config()
    rows.settings = {**rows.settings, **SHRUNK[rows.task], 'source': 'synthetic'}
    assert rows.get('reference', 'adam') in rows.rows
    for row, entry in rows.rows.items():
        if entry.get('optimizer'):
            yield table.configs_of(rows, row, 0)
        else:
            assert entry.note


STUDIES = {
    'sonew': autoencoder_sonew.get_config,
    'sonew_long': autoencoder_sonew_long.get_config,
    'pos_tagging_cost': pos_tagging_cost.get_config,
}


@pytest.mark.parametrize('name', [*COMMITTED, *STUDIES])
def test_committed_tables_can_be_run(name):
    """Each row's settings fit its configs, and a run could start."""
    for configs in committed_rows((COMMITTED | STUDIES)[name]):
        train.check(*configs)


@pytest.mark.slow
@pytest.mark.parametrize('name', COMMITTED)
def test_committed_tables_take_a_step(name):
    """And leave shapes and dtypes as they are, whatever the parameters' dtype."""
    for configs in committed_rows(COMMITTED[name]):
        task = train.check(*configs)
        run = program.single(task, *configs)
        carry = jax.eval_shape(run.initial)
        if task.stream is not None:
            batch = task.stream.shapes[0]
        else:
            batch = task.train_data[: task.batch_size]
        params, state, _ = jax.eval_shape(run.step, carry.params, carry.opt_state, batch)
        assert (params, state) == carry[:2]

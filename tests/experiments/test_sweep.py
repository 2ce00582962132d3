"""Searches: what is drawn, who is stopped, runs in one program, what an interruption costs."""

import json
import shutil

import numpy as np
import pytest

from experiments import sweep, tasks, train
from tests.experiments import stand_in
from tests.experiments.small import (
    OPTIMIZERS,
    ROOT,
    config_of,
    for_few_steps,
    lines,
    small_task,
    without_clock,
)


def varied(name, factors=(1.0, 0.5, 0.25)):
    """Configs of an optimizer with all that is searched made smaller."""
    configs = []
    for factor in factors:
        config = for_few_steps(config_of('optimizers', name))
        for key, axis in config.search_space.items():
            value = config[key]
            config[key] = 1 - (1 - value) * factor if axis.get('one_minus') else value * factor
        configs.append(config)
    return configs


def random_search(**changes):
    search = config_of('searches', 'random')
    search.update({'trials': 4, **changes})
    return search


FEW = ('sonew',)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in OPTIMIZERS if name not in FEW]


@pytest.mark.parametrize('name', [*FEW, *SLOW])
def test_runs_in_one_program_equal_single_runs(name, tmp_path):
    """Each optimizer's searched floats can be traced, and a run does not see the others."""
    task, configs = small_task(epochs=2), varied(name)
    alone = [
        train.train_and_evaluate(task, config, tmp_path / f'alone{i}', progress=False)
        for i, config in enumerate(configs[1:])
    ]
    prepared = [train.prepare(task, c, tmp_path / f'{i}') for i, c in enumerate(configs)]
    assert len({train.kinship(experiment) for experiment in prepared}) == 1
    together = train.train_together(prepared, progress=False)
    losses = [summary['train_loss'] for summary in together]
    np.testing.assert_allclose(losses[1:], [s['train_loss'] for s in alone], rtol=1e-4)
    assert len(set(losses)) == 3
    for i, single in enumerate(alone):
        rows = [lines(tmp_path / folder) for folder in (f'alone{i}', f'{i + 1}')]
        for one, other in zip(*map(without_clock, rows), strict=True):
            assert one == pytest.approx(other, rel=1e-4)
        same = ('num_params', 'state_bytes', 'steps', 'notfinite')
        assert {k: single[k] for k in same} == {k: together[i + 1][k] for k in same}


def test_runs_in_one_program_keep_the_parameters_dtype(tmp_path):
    """Traced floats have no dtype of their own: bfloat16 stays bfloat16."""
    task = small_task(param_dtype='bfloat16')
    prepared = [train.prepare(task, c, tmp_path / str(i)) for i, c in enumerate(varied('sonew'))]
    summaries = train.train_together(prepared, progress=False)
    alone = train.train_and_evaluate(task, varied('sonew')[2], tmp_path / 'a', progress=False)
    assert summaries[2]['train_loss'] == pytest.approx(alone['train_loss'], rel=1e-2)
    assert summaries[2]['state_bytes'] == alone['state_bytes']


@pytest.mark.slow
def test_run_of_a_group_goes_on_alone(tmp_path):
    """Checkpoints do not tell how a run was trained: it can leave a group, or join one."""
    task, configs = small_task(epochs=4), varied('adam')
    whole = train.train_and_evaluate(task, configs[1], tmp_path / 'whole', progress=False)

    def prepared(number):
        return train.prepare(task, configs[number], tmp_path / str(number))

    train.train_together([prepared(i) for i in range(3)], progress=False, stop_after=4)
    assert train.train(prepared(1), progress=False, stop_after=8) == {'step': 8}
    with pytest.raises(ValueError, match=r'from one step; they are at \[4, 8\]'):
        train.train_together([prepared(0), prepared(1)], progress=False)
    train.train(prepared(0), progress=False, stop_after=8)
    ends = train.train_together([prepared(0), prepared(1)], progress=False)
    assert ends[1]['train_loss'] == pytest.approx(whole['train_loss'], rel=1e-5)
    assert [row['step'] for row in lines(tmp_path / '1')] == list(range(1, 17))


def test_sweep_is_resumed_and_sorted(tmp_path):
    search = config_of('searches', 'learning_rate')
    arguments = (small_task(), config_of('optimizers', 'adam'), search, tmp_path)
    trials = sweep.sweep(*arguments)
    assert len(trials) == 4
    assert {t['hyperparameters']['learning_rate'] for t in trials} == {1e-3, 2e-3, 3e-3, 5e-3}
    assert [t['metric'] for t in trials] == sorted(t['metric'] for t in trials)
    stamps = {f: f.stat().st_mtime_ns for f in tmp_path.glob('*/summary.json')}
    assert sweep.sweep(*arguments) == trials
    assert {f: f.stat().st_mtime_ns for f in tmp_path.glob('*/summary.json')} == stamps


def test_random_search_stays_in_its_space(tmp_path):
    search = config_of('searches', 'paper_random')
    search.trials = 3
    trials = sweep.sweep(small_task(), config_of('optimizers', 'sonew'), search, tmp_path)
    assert len({json.dumps(t['hyperparameters']) for t in trials}) == 3
    for name, axis in search.space.items():
        for trial in trials:
            value = trial['hyperparameters'][name]
            assert axis.low <= (1 - value if axis.get('one_minus') else value) <= axis.high


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(sampler='bayes'), "search.sampler must be 'grid' or 'random'|needs low and high"),
        (dict(sampler='random'), r'search.space.b2 needs low and high'),
        (
            dict(metric='train_los'),
            r"search.metric must be one of \['test_loss', 'train_loss'\], got 'train_los'",
        ),
    ],
)
def test_bad_search(changes, message, tmp_path):
    search = config_of('searches', 'sonew_b2_eps')
    search.update(changes)
    with pytest.raises(ValueError, match=message):
        sweep.sweep(small_task(), config_of('optimizers', 'sonew'), search, tmp_path)


def test_sweep_over_an_unknown_hyperparameter(tmp_path):
    search = config_of('searches', 'sonew_b2_eps')
    with pytest.raises(ValueError, match=r"\['b2', 'eps'\], which the optimizer config has not"):
        sweep.sweep(small_task(), config_of('optimizers', 'sgd'), search, tmp_path)


def test_search_space_of_the_optimizer(tmp_path):
    """Without a space of its own, the search is over the optimizer's, with as many trials as asked
    for.
    """
    config = config_of('optimizers', 'adam')
    trials = sweep.sweep(small_task(), config, random_search(), tmp_path, trials=3)
    assert len(trials) == 3
    for trial in trials:
        assert set(trial['hyperparameters']) == set(config.search_space)
        held = json.loads((tmp_path / trial['trial'] / 'config.json').read_text())['optimizer']
        assert 'search_space' not in held
        assert {k: held[k] for k in trial['hyperparameters']} == trial['hyperparameters']


def test_worst_trials_are_stopped_at_each_rung(tmp_path):
    """Of 4 trials 2 go past the first rung and 1 past the second: those whose loss was least."""
    task = small_task(epochs=5)  # 20 steps
    trials = sweep.sweep(task, config_of('optimizers', 'adam'), random_search(), tmp_path)
    steps = {t['trial']: lines(tmp_path / t['trial'])[-1]['step'] for t in trials}
    assert sorted(steps.values()) == [8, 8, 16, 20]
    assert [t.get('stopped_at') for t in trials] == [None, 16, *[8, 8]]
    for stop, kept in ((8, 2), (16, 1)):
        losses = {
            t['trial']: row['loss']
            for t in trials
            for row in lines(tmp_path / t['trial'])
            if row['step'] == stop
        }
        best = sorted(losses, key=losses.get)[:kept]
        assert {t for t, step in steps.items() if step > stop} == set(best)
    best = json.loads((tmp_path / trials[0]['trial'] / 'summary.json').read_text())
    assert trials[0]['metric'] == best['train_loss']


def test_a_search_for_what_is_tracked_stops_by_it(tmp_path, monkeypatch):
    """The stand-in tracks the largest loss, of which the loss would keep the other ones."""
    monkeypatch.setitem(tasks._MODULES, 'stand_in', 'tests.experiments.stand_in')
    task = stand_in.get_config()
    task.update(evaluate_every_steps=2)
    rates = {'learning_rate': {'grid': (1e-4, 1e-3, 1e-2, 1e-1)}}
    search = random_search(sampler='grid', space=rates, rungs=(0.5,), metric='best_train_loss')
    trials = sweep.sweep(task, config_of('optimizers', 'sgd'), search, tmp_path)
    assert [t.get('stopped_at') for t in trials] == [None, None, 6, 6]
    worst = {
        t['trial']: max(
            row['train_loss']
            for row in lines(tmp_path / t['trial'])
            if row['step'] <= 6 and 'train_loss' in row
        )
        for t in trials
    }
    assert min(worst[t['trial']] for t in trials[:2]) > max(worst[t['trial']] for t in trials[2:])
    assert {t['hyperparameters']['learning_rate'] for t in trials[:2]} == {1e-4, 1e-3}
    assert [t['metric'] for t in trials[2:]] == [worst[t['trial']] for t in trials[2:]]


def test_rungs_are_at_checkpoints(tmp_path, monkeypatch):
    """Two at one step are one, and one at the last step, which is not a multiple, is none."""
    told = []
    monkeypatch.setattr(sweep.logging, 'warning', lambda text, *args: told.append(text % args))
    task = small_task(checkpoint_every_steps=6, checkpoint_every_epochs=None)  # of 8 steps
    made = train.check(task, config_of('optimizers', 'sgd'))
    parts = (0.1, 0.5, 0.75, 0.8)
    assert [train.checkpoint_at(made, task, part) for part in parts] == [6, 6, 6, 8]
    search = random_search(rungs=parts)
    trials = sweep.sweep(task, config_of('optimizers', 'sgd'), search, tmp_path)
    assert [t.get('stopped_at') for t in trials] == [None, None, 6, 6]
    assert len(told) == 1
    assert told[0].startswith('no trial is stopped at [0.8] of a run')


@pytest.mark.slow
@pytest.mark.parametrize('together', [2, 4])
def test_sweep_does_not_depend_on_how_many_are_trained_together(together, tmp_path):
    task, config = small_task(epochs=5), config_of('optimizers', 'adam')
    alone = sweep.sweep(task, config, random_search(), tmp_path / 'a')
    trials = sweep.sweep(task, config, random_search(), tmp_path / 'b', together=together)
    for one, other in zip(alone, trials, strict=True):
        assert (one['trial'], one['hyperparameters']) == (other['trial'], other['hyperparameters'])
        assert one['metric'] == pytest.approx(other['metric'], rel=1e-4)
        assert one.get('stopped_at') == other.get('stopped_at')


def test_only_trials_that_differ_in_floats_are_trained_together(tmp_path, monkeypatch):
    search = config_of('searches', 'sonew_b2_eps')
    search.space = {'b2': {'grid': (0.9, 0.99)}, 'band': {'grid': (0, 1)}}
    sizes, real = [], train.train_together

    def train_together(experiments, **keywords):
        sizes.append(len(experiments))
        return real(experiments, **keywords)

    monkeypatch.setattr(train, 'train_together', train_together)
    config = config_of('optimizers', 'sonew')
    assert len(sweep.sweep(small_task(), config, search, tmp_path, together=8)) == 4
    assert sizes == [2, 2]


LATER = [pytest.param(n, marks=pytest.mark.slow) for n in (1, 5, 6)]


@pytest.mark.parametrize('after', [3, *LATER])
def test_interrupted_sweep_loses_nothing(after, tmp_path, monkeypatch):
    """Stopped before its nth call of the loop and started again: the same trials and numbers."""
    task, config = small_task(epochs=5), config_of('optimizers', 'adam')
    expected = sweep.sweep(task, config, random_search(), tmp_path / 'whole')
    calls, real = [], train.train_together

    def train_together(experiments, **keywords):
        calls.append(len(experiments))
        if len(calls) == after:
            raise KeyboardInterrupt
        return real(experiments, **keywords)

    with monkeypatch.context() as patched:
        patched.setattr(train, 'train_together', train_together)
        with pytest.raises(KeyboardInterrupt):
            sweep.sweep(task, config, random_search(), tmp_path / 'cut')
    assert sweep.sweep(task, config, random_search(), tmp_path / 'cut') == expected


@pytest.mark.parametrize('row', ['adam', 'muon', 'sonew_tridiagonal'])
def test_draws_hang_on_the_seed_and_the_number(row):
    """They are those of the committed searches."""
    import optuna

    file = ROOT / 'experiments/results/autoencoder/table_search' / row / 'sweep.json'
    held = json.loads(file.read_text())
    for trial in held['trials']:
        sampler = sweep.make_sampler(held['search'], int(trial['trial']))
        drawn = sweep.suggest(optuna.create_study(sampler=sampler).ask(), held['search']['space'])
        assert drawn == trial['hyperparameters']


def untrained(monkeypatch, **changes):
    """A search of two trials, which are not trained."""
    monkeypatch.setattr(sweep, '_train', lambda runs, *_: [{'train_loss': 1.0} for _ in runs])
    return random_search(**{'trials': 2, 'rungs': (), **changes})


def test_trial_that_a_kill_left_half_drawn(tmp_path, monkeypatch):
    """Stopped before the third of the second trial's four values: it gets the same ones."""
    from optuna.trial import Trial

    task, config, search = small_task(), config_of('optimizers', 'adam'), untrained(monkeypatch)
    expected = sweep.sweep(task, config, search, tmp_path / 'whole')
    kept, real = [], Trial.suggest_float

    def suggest_float(self, name, *bounds, **keywords):
        if self.study.study_name == 'sweep':
            if len(kept) == 6:
                raise KeyboardInterrupt
            kept.append(name)
        return real(self, name, *bounds, **keywords)

    with monkeypatch.context() as patched:
        patched.setattr(Trial, 'suggest_float', suggest_float)
        with pytest.raises(KeyboardInterrupt):
            sweep.sweep(task, config, search, tmp_path / 'cut')
    assert len(set(kept)) == 4
    assert sweep.sweep(task, config, search, tmp_path / 'cut') == expected


def test_a_search_of_other_configs_is_refused(tmp_path, monkeypatch):
    """But what is searched, and how runs are carried out, may be others."""
    rates = dict(learning_rate=dict(low=1e-3, high=1e-2))
    search = untrained(monkeypatch, space=rates)
    task, config = small_task(), config_of('optimizers', 'sonew')
    found = sweep.sweep(task, config, search, tmp_path)
    wide = config_of('optimizers', 'sonew')
    wide.band = 4
    for other_task, optimizer, message in (
        (small_task(epochs=3), config, 'task.epochs: 2 there, 3 given'),
        (task, wide, 'optimizer.band: 1 there, 4 given'),
        (task, config_of('optimizers', 'adam'), "optimizer.name: 'sonew' there, 'adam' given"),
    ):
        with pytest.raises(ValueError, match=f'a search of another configuration: {message}'):
            sweep.sweep(other_task, optimizer, search, tmp_path)
    config.learning_rate = 0.5
    with task.unlocked():
        task.max_to_keep = 2
    assert sweep.sweep(task, config, search, tmp_path) == found


def test_a_study_without_configs_takes_them_on(tmp_path, monkeypatch):
    """One of before they were kept."""
    search = untrained(monkeypatch)
    task, config = small_task(), config_of('optimizers', 'adam')
    found = sweep.sweep(task, config, search, tmp_path)
    journal = tmp_path / 'study.jsonl'
    rows = journal.read_text().splitlines(keepends=True)
    old = [row for row in rows if '"user_attr":{"config"' not in row]
    assert len(old) == len(rows) - 1
    journal.write_text(''.join(old))
    assert sweep.sweep(task, config, search, tmp_path) == found
    with pytest.raises(ValueError, match=r'task\.epochs: 2 there, 3 given'):
        sweep.sweep(small_task(epochs=3), config, search, tmp_path)


def test_a_search_goes_by_the_loss_unless_it_names_a_metric(tmp_path, monkeypatch):
    search = untrained(monkeypatch)
    assert search.metric is None
    sweep.sweep(small_task(), config_of('optimizers', 'adam'), search, tmp_path)
    held = json.loads((tmp_path / 'sweep.json').read_text())
    assert held['search']['metric'] == 'train_loss'
    assert held['largest'] is False


def test_more_trials_are_added_to_those_that_are_there(tmp_path):
    """The first ones stay as they are, the new ones are those of a longer search."""
    task, config = small_task(), config_of('optimizers', 'adam')
    search = random_search(rungs=())
    few = sweep.sweep(task, config, search, tmp_path / 'a', trials=2)
    more = sweep.sweep(task, config, search, tmp_path / 'a', trials=4)
    assert [t for t in more if t in few] == few
    assert sweep.sweep(task, config, search, tmp_path / 'b', trials=4) == more
    other = random_search(rungs=(), seed=1)
    with pytest.raises(ValueError, match='holds another search'):
        sweep.sweep(task, config, other, tmp_path / 'a')


def test_study_is_an_optuna_study(tmp_path):
    """Whoever knows Optuna reads it with Optuna."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    config = config_of('optimizers', 'adam')
    trials = sweep.sweep(small_task(epochs=5), config, random_search(), tmp_path)
    shutil.copy(tmp_path / 'study.jsonl', tmp_path / 'copy')
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path / 'copy')))
    study = optuna.load_study(study_name='sweep', storage=storage)
    assert study.best_trial.number == int(trials[0]['trial'])
    states = [trial.state.name for trial in study.trials]
    assert sorted(states) == ['COMPLETE', 'PRUNED', 'PRUNED', 'PRUNED']


def test_diverged_trials_are_the_worst(tmp_path):
    """They are stopped first, and are no error."""
    config = config_of('optimizers', 'sgd')
    search = random_search(
        space={'learning_rate': {'grid': (1e-3, 1e9)}}, sampler='grid', rungs=(0.5,)
    )
    task = small_task(max_consecutive_errors=0)
    trials = sweep.sweep(task, config, search, tmp_path)
    assert [t['hyperparameters']['learning_rate'] for t in trials] == [1e-3, 1e9]
    assert 'stopped_at' in trials[1]


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(rungs=(0.7, 0.4)), r'search.rungs must rise and lie between 0 and 1'),
        (dict(rungs=(1.0,)), r'search.rungs must rise and lie between 0 and 1'),
        (dict(keep=0.0), r'search.keep must be in \(0, 1\], got 0.0'),
    ],
)
def test_bad_rungs(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sweep.sweep(
            small_task(), config_of('optimizers', 'adam'), random_search(**changes), tmp_path / 'a'
        )
    assert not (tmp_path / 'a').exists(), 'a wrong search leaves nothing behind'


def test_nothing_to_search(tmp_path):
    config = config_of('optimizers', 'adam')
    del config.search_space
    with pytest.raises(ValueError, match='nothing to search'):
        sweep.sweep(small_task(), config, random_search(), tmp_path)

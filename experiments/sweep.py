"""Searches an optimizer's hyperparameters with Optuna, one run for each trial.

python -m experiments.sweep --task=configs/tasks/autoencoder.py --task.epochs=10 \\
    --optimizer=configs/optimizers/sonew.py --workdir=DIR --data_dir=DATA [--trials=16] \\
    [--search=configs/searches/random.py] [--together=8]

The ranges are the ``search_space`` of the optimizer's config, or the ``space`` of the search's.
Each trial is a workdir of its own, DIR/000, DIR/001, ...; the study is DIR/study.jsonl, in
Optuna's journal format. A sweep that was interrupted is started again by the same command: its
trials go on from their last checkpoints, and one with more trials adds to it.

Trials that differ in floats alone are trained together in one program, as many as --together says;
by default one on CPUs, which gain nothing by it, and elsewhere as many as the device has room for.

The least value of the search's metric, train_loss if it names none, is the best, but for the one
that a task tracks, such as a tagger's best_dev_accuracy, of which it is the largest. A search for
that stops trials by it; the others by the training loss.
"""

import itertools
import math
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags, logging
from ml_collections import config_dict, config_flags

from experiments import main as main_lib
from experiments import train
from experiments import workdir as workdir_lib

_SEARCH = config_flags.DEFINE_config_file(
    'search', 'configs/searches/random.py', 'Config file of the search.'
)
_TRIALS = flags.DEFINE_integer('trials', None, 'Of a random search.', lower_bound=1)
_TOGETHER = flags.DEFINE_integer(
    'together', None, 'Trials in one program; as many as there is room for.', lower_bound=1
)

_METRIC = 'train_loss'  # of a search that names none


def suggest(trial: Any, space: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A trial's hyperparameters.

    Each name of ``space`` has either ``grid``, the values, or ``low`` and ``high``, of which the
    logarithm is uniform; with ``one_minus`` they bound one minus the hyperparameter.
    """
    values = {}
    for name, axis in space.items():
        if 'grid' in axis:
            values[name] = trial.suggest_categorical(name, list(axis['grid']))
        else:
            label = f'1-{name}' if axis.get('one_minus') else name
            drawn = trial.suggest_float(label, axis['low'], axis['high'], log=True)
            values[name] = 1 - drawn if axis.get('one_minus') else drawn
    return values


def make_sampler(search: Mapping[str, Any], number: int) -> Any:
    """Optuna's sampler for the trial of this number.

    What it draws hangs on no other trial, nor on which of its values are drawn already: they are
    drawn all at once, so that a trial of which a kill left the first ones gets the same others.
    """
    import optuna

    random = optuna.samplers.RandomSampler(seed=search['seed'] * 1_000_003 + number)
    if search['sampler'] == 'random':
        drawn = optuna.create_study(sampler=random).ask()
        suggest(drawn, search['space'])
        values = drawn.params
    else:  # not GridSampler, which stops its study and must not be asked
        axes = {name: axis['grid'] for name, axis in search['space'].items()}
        point = list(itertools.product(*axes.values()))[number]
        values = dict(zip(axes, point, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.PartialFixedSampler(values, random)


def _check(search: Mapping[str, Any], optimizer_config: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` for a search that is none."""
    if search['sampler'] not in ('grid', 'random'):
        raise ValueError(f"search.sampler must be 'grid' or 'random', got {search['sampler']!r}.")
    if not search['space']:
        raise ValueError(
            'nothing to search: neither the search has a space nor the optimizer config a '
            'search_space.'
        )
    for name, axis in search['space'].items():
        wanted = ('grid',) if search['sampler'] == 'grid' else ('low', 'high')
        if not all(key in axis for key in wanted):
            raise ValueError(
                f'search.space.{name} needs {" and ".join(wanted)} for sampler '
                f'{search["sampler"]!r}, got {dict(axis)}.'
            )
    if unknown := sorted(set(search['space']) - set(optimizer_config)):
        raise ValueError(
            f'search.space has {unknown}, which the optimizer config has not; it has '
            f'{sorted(optimizer_config)}.'
        )
    rungs, keep = search['rungs'], search['keep']
    if list(rungs) != sorted(rungs) or not all(0 < rung < 1 for rung in rungs):
        raise ValueError(f'search.rungs must rise and lie between 0 and 1, got {rungs!r}.')
    if not 0 < keep <= 1:
        raise ValueError(f'search.keep must be in (0, 1], got {keep!r}.')


def sweep(
    task_config: config_dict.ConfigDict,
    optimizer_config: config_dict.ConfigDict,
    search: Mapping[str, Any],
    workdir: str | pathlib.Path,
    data_dir: str | None = None,
    *,
    trials: int | None = None,
    together: int | None = None,
) -> list[dict[str, Any]]:
    """Runs the trials of a search.

    At each of ``search.rungs``, parts of a run, the trials that are left are compared, and the
    best ``search.keep`` of them go on: by the mean loss that they last logged, or, where the
    search is for what the task tracks, by the best of that so far. All trials come to a rung
    before any goes on, so which ones are stopped does not depend on the order or on how many are
    trained together. A rung is at a step with a checkpoint; one that falls on the last step stops
    none.

    Args:
      task_config: see ``configs/tasks``.
      optimizer_config: see ``configs/optimizers``; its values are those that are not searched.
      search: see ``configs/searches``.
      workdir: where the trials' workdirs, ``study.jsonl`` and ``sweep.json`` go.
      data_dir: where the data set lies.
      trials: of a random search, in place of ``search.trials``.
      together: how many trials one program trains at most. None: see above.

    Returns:
      The trials, best first: ``{'trial', 'hyperparameters', 'metric'}``, and for those that were
      stopped ``stopped_at``, the step; they come last.

    Raises:
      ValueError: for a search that is none, or a hyperparameter that the optimizer's config does
        not have; or if the workdir holds another search, or one of other configs.
    """
    import optuna

    search = {'rungs': [], 'keep': 1.0, **workdir_lib.plain(search)}
    search['metric'] = search.get('metric') or _METRIC
    search.setdefault('space', workdir_lib.plain(optimizer_config).get('search_space'))
    _check(search, optimizer_config)
    task = train.check(task_config, optimizer_config, data_dir)
    largest = [task.tracked, f'best_{task.tracked}'] if task.tracked else []
    sign = -1 if search['metric'] in largest else 1  # the study minimises
    tracked = task.tracked if sign < 0 else ''
    metrics = sorted({*train.metrics(task), *largest})
    if search['metric'] not in metrics:
        raise ValueError(f'search.metric must be one of {metrics}, got {search["metric"]!r}.')
    given = search.pop('trials', None)
    count = given if trials is None else trials
    if search['sampler'] == 'grid':
        count = math.prod(len(axis['grid']) for axis in search['space'].values())
    elif not isinstance(count, int) or count < 1:
        raise ValueError(f'search.trials must be an integer >= 1, got {count!r}.')
    root = pathlib.Path(workdir)
    root.mkdir(parents=True, exist_ok=True)
    study = _open(root, search, task_config, optimizer_config)
    for trial in _running(study):  # a kill may have cut off what they drew; the rest they keep
        study.sampler = make_sampler(search, trial.number)
        suggest(optuna.trial.Trial(study, trial._trial_id), search['space'])
    for number in range(len(study.trials), count):
        study.sampler = make_sampler(search, number)
        suggest(study.ask(), search['space'])

    def prepared(trial: Any) -> train.Experiment:
        config = optimizer_config.copy_and_resolve_references()
        config.update(values_of(trial, search['space']))
        return train.prepare(task_config, config, root / f'{trial.number:03d}', data_dir)

    stops = {part: train.checkpoint_at(task, task_config, part) for part in search['rungs']}
    if late := [part for part, stop in stops.items() if stop == task.num_steps]:
        logging.warning(
            'no trial is stopped at %s of a run: the next checkpoint is its end; a smaller '
            'checkpoint_every of the task makes the search shorter.',
            late,
        )
    for stop in sorted({*stops.values()} - {task.num_steps}):
        left = _running(study)
        experiments = [prepared(trial) for trial in left]
        values = _to_rung(experiments, stop, together, tracked)
        for trial, value in zip(left, values, strict=True):
            if stop not in trial.intermediate_values:
                optuna.trial.Trial(study, trial._trial_id).report(value, stop)
        # All that ever came here compete, so trials that are added later must be among the best.
        came = [t for t in study.trials if stop in t.intermediate_values]
        came.sort(key=lambda trial: trial.intermediate_values[stop])
        for trial in came[math.ceil(search['keep'] * len(came)) :]:
            if trial.state == optuna.trial.TrialState.RUNNING:
                study.tell(trial.number, state=optuna.trial.TrialState.PRUNED)
    left = _running(study)
    for trial, summary in zip(left, _train([prepared(t) for t in left], together), strict=True):
        study.tell(trial.number, _finite(summary[search['metric']], sign))
    found = [_row(trial, search) for trial in study.trials]
    found.sort(key=lambda row: (row.get('stopped_at') is not None, row['metric']))
    for row in found:  # as they are: the study's are the less the better
        row['metric'] *= sign
        if 'stopped_at' in row:
            rows = workdir_lib.read_metrics(root / row['trial'])
            row['metric'], _ = at_rung(rows, row['stopped_at'], tracked)
    content = {'search': search, 'largest': sign < 0, 'trials': found}
    workdir_lib.write_json(root / 'sweep.json', content)
    return found


def _open(
    root: pathlib.Path,
    search: Mapping[str, Any],
    task_config: Mapping[str, Any],
    optimizer_config: Mapping[str, Any],
) -> Any:
    """The study in a folder, made if there is none.

    It keeps what all trials have of the configs; one that was made before it did takes them on.

    Raises:
      ValueError: if it is of another search, or of other configs.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name='sweep',
        storage=optuna.storages.JournalStorage(JournalFileBackend(str(root / 'study.jsonl'))),
        load_if_exists=True,
    )
    if (held := study.user_attrs.get('search', search)) != search:
        raise ValueError(f'workdir {root} holds another search: {held}, not {search}.')
    config = {
        group: {k: v for k, v in workdir_lib.plain(whole).items() if k not in varied}
        for group, whole, varied in (
            ('task', task_config, workdir_lib.CARRIED_OUT),
            ('optimizer', optimizer_config, {'search_space', *search['space']}),
        )
    }
    if found := workdir_lib.differences(
        study.user_attrs.get('config', config), config['task'], config['optimizer']
    ):
        raise ValueError(f'workdir {root} holds a search of another configuration: {found[0]}.')
    study.set_user_attr('search', search)
    if 'config' not in study.user_attrs:
        study.set_user_attr('config', config)
    return study


def _running(study: Any) -> list[Any]:
    """The trials that are neither through nor stopped."""
    return [trial for trial in study.trials if trial.state.name == 'RUNNING']


def values_of(trial: Any, space: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The hyperparameters of a trial that was suggested before."""
    drawn = trial.params
    return {
        name: 1 - drawn[f'1-{name}'] if axis.get('one_minus') else drawn[name]
        for name, axis in space.items()
    }


def _finite(metric: float | None, sign: int = 1) -> float:
    """A run that left the numbers behind is the worst, and no error."""
    return math.inf if metric is None or not math.isfinite(metric) else sign * metric


def _row(trial: Any, search: Mapping[str, Any]) -> dict[str, Any]:
    """What ``sweep.json`` says of a trial."""
    row = {
        'trial': f'{trial.number:03d}',
        'hyperparameters': values_of(trial, search['space']),
        'metric': trial.value,
    }
    return row | ({'stopped_at': trial.last_step} if trial.state.name == 'PRUNED' else {})


def _to_rung(
    experiments: Sequence[train.Experiment], stop: int, together: int | None, tracked: str
) -> list[float]:
    """Trains all up to a step; the numbers by which they are compared there, see `at_rung`."""

    def logs() -> list[list[dict[str, Any]]]:
        return [workdir_lib.read_metrics(experiment.run.path) for experiment in experiments]

    there = [any(row['step'] == stop for row in rows) for rows in logs()]
    missing = [e for e, is_there in zip(experiments, there, strict=True) if not is_there]
    _train(missing, together, stop_after=stop)
    found = (at_rung(rows, stop, tracked) for rows in logs())
    return [-value if larger else value for value, larger in found]


def at_rung(rows: Sequence[Mapping[str, Any]], stop: int, tracked: str = '') -> tuple[float, bool]:
    """What a trial's log says of it at a step, and whether more of that is better.

    Example:
      >>> rows = [{'step': 1, 'loss': 3.0, 'dev_accuracy': 0.7}, {'step': 2, 'loss': 2.0}]
      >>> at_rung(rows, 2), at_rung(rows, 2, 'dev_accuracy')
      ((2.0, False), (0.7, True))
    """
    so_far = [row for row in rows if row['step'] <= stop]
    measured = [row[tracked] for row in so_far if row.get(tracked) is not None]
    if measured:
        return max(measured), True
    return next(_finite(row['loss']) for row in so_far if row['step'] == stop), False


def _train(
    experiments: Sequence[train.Experiment], together: int | None, stop_after: int | None = None
) -> list[dict[str, Any]]:
    """The runs' summaries, in order; those that fit into one program are trained together."""
    summaries: dict[int, dict[str, Any]] = {}
    groups: dict[str, list[int]] = {}
    for i, experiment in enumerate(experiments):
        groups.setdefault(train.kinship(experiment), []).append(i)
    for members in groups.values():
        size = together or train.room(experiments[members[0]])
        for start in range(0, len(members), size):
            batch = members[start : start + size]
            done = train.train_together([experiments[i] for i in batch], stop_after=stop_after)
            summaries.update(zip(batch, done, strict=True))
    return [summaries[i] for i in range(len(experiments))]


def main(argv: list[str]) -> None:
    """Runs the search of the flags and prints its trials, best first."""
    main_lib.refuse_arguments(argv)
    flag = flags.FLAGS
    with main_lib.clear_errors():
        trials = sweep(
            flag.task,
            flag.optimizer,
            _SEARCH.value,
            flag.workdir,
            flag.data_dir,
            trials=_TRIALS.value,
            together=_TOGETHER.value,
        )
    for trial in trials:
        stopped = f'  stopped at {trial["stopped_at"]}' if 'stopped_at' in trial else ''
        print(f'{trial["metric"]:10.4f}  {trial["trial"]}  {trial["hyperparameters"]}{stopped}')


if __name__ == '__main__':
    main_lib.run(main, 'task', 'optimizer', 'workdir')

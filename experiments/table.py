"""Reruns a paper's table: each row for each seed, then the table and its figure.

python -m experiments.table --table=configs/tables/autoencoder.py --workdir=DIR --data_dir=DATA \\
    [--rows=REGEX] [--seeds=0,1,2]

A run is a workdir, DIR/ROW/seed_0 and so on. What is interrupted goes on by the same command, what
is there is not run again; rows and seeds may be added later. Writes DIR/table.md, table.json and
table.png (loss by epoch, or step, and by second) from all runs in DIR that are through; those of
other settings than the table's are named below it. Memory is what the compiler plans for the
program, arguments and temporaries, not what was measured.

The settings of its rows come from a search in two stages, with the same budget for each row:

python -m experiments.table --stage=search --epochs=10 --table=... --workdir=DIR --data_dir=DATA
python -m experiments.table --stage=finals --best=2 --table=... --workdir=DIR --data_dir=DATA

The first sweeps the ranges of each row's optimizer config into DIR/ROW, in shorter runs, by the
table's first metric if --search.metric names none; it takes --search, --trials and --together of
`experiments.sweep`. The second trains the best of them for the whole length, in DIR/ROW/finals.
They write DIR/search.md and DIR/finals.md, with all rows that are there.
"""

import importlib
import json
import math
import pathlib
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from absl import flags
from ml_collections import config_dict, config_flags

from experiments import main as main_lib
from experiments import optimizers, report, sweep, train, workdir

_TABLE = config_flags.DEFINE_config_file('table', None, 'Config file of the table.')
_ROWS = flags.DEFINE_string('rows', '', 'Which rows to run: a regular expression, searched for.')
_STAGE = flags.DEFINE_enum('stage', 'table', ['table', 'search', 'finals'], 'What to run.')
_EPOCHS = flags.DEFINE_integer('epochs', None, "In place of the task's.", lower_bound=1)
_BEST = flags.DEFINE_integer('best', 2, 'Trials of each search to run at length.', lower_bound=1)
_SEEDS = flags.DEFINE_list('seeds', ['0'], 'Seeds of the parameters and of the shuffling.')

Configs: TypeAlias = tuple[config_dict.ConfigDict, config_dict.ConfigDict]  # task's, optimizer's


class Metric(NamedTuple):
    """A number of a summary that a table shows."""

    name: str  # in the summary; 'a/b' is b in its group a
    header: str
    scale: float = 1.0  # 100 for per cent
    digits: int = 2  # after the point

    def of(self, summary: Mapping[str, Any]) -> float:
        """The scaled number; nan where the run left the numbers behind."""
        value: Any = summary
        for part in self.name.split('/'):
            value = value[part]
        return math.nan if value is None else self.scale * value

    def show(self, value: float) -> str:
        """A scaled number as it stands in a cell."""
        return f'{value:.{self.digits}f}'


_COSTS = (
    (Metric('seconds', 'seconds'), ''),
    (Metric('state_bytes', 'state bytes'), ''),
    (Metric('program_bytes', 'memory', 2**-20), ' MiB'),
)
_REFERENCE = 'adam'  # the row to whose costs the others' are ratios, if a table names none


def metrics_of(table: Mapping[str, Any]) -> list[Metric]:
    """The columns of a table, the one that it is sorted by first."""
    return [Metric(*entry) for entry in table['metrics']]


def _metric_of(table: Mapping[str, Any], name: str) -> Metric:
    """What a search went by, as the table shows it; what is no column of it, with more digits."""
    columns = {metric.name: metric for metric in metrics_of(table)}
    return columns.get(name, Metric(name, name.replace('_', ' '), digits=4))


def configs_of(table: Mapping[str, Any], row: str, seed: int) -> Configs:
    """The configs of a row's run: its task's and its optimizer's.

    A task's name may have an argument for its config, as ``language_model:small``.

    Raises:
      ValueError: if a row or the task sets what its config has not.
    """
    entry = table['rows'][row]
    made = []
    for kind, given, changes in (
        ('tasks', table['task'], {**table['settings'], 'seed': seed}),
        ('optimizers', entry['optimizer'], entry.get('settings', {})),
    ):
        name, *arguments = given.split(':')
        config = importlib.import_module(f'configs.{kind}.{name}').get_config(*arguments)
        if unknown := sorted(set(changes) - set(config)):
            raise ValueError(f'row {row!r}: configs/{kind}/{name}.py has no {unknown}.')
        for field, value in changes.items():
            if isinstance(value, Mapping | config_dict.ConfigDict):
                del config[field]  # ranges, say: these alone, not beside the config's own
        config.update(dict(changes))
        made.append(config)
    return made[0], made[1]


def runnable(table: Mapping[str, Any], rows: str) -> list[str]:
    """The rows whose names a regular expression is found in, but for those that cannot be run.

    Raises:
      ValueError: if there are none.
    """
    chosen = [row for row, e in table['rows'].items() if re.search(rows, row) and 'optimizer' in e]
    if not chosen:
        raise ValueError(f'--rows={rows!r} is in none of {sorted(table["rows"])}.')
    return chosen


def _configs_of_trial(table: Mapping[str, Any], row: str, trial: Mapping[str, Any]) -> Configs:
    """The configs of a row with what a trial of its search drew."""
    task, optimizer = configs_of(table, row, seed=0)
    optimizer.update(trial['hyperparameters'])
    return task, optimizer


def search(
    table: Mapping[str, Any],
    folder: str | pathlib.Path,
    data_dir: str | None = None,
    rows: str = '',
    *,
    search: Mapping[str, Any],
    **keywords: Any,
) -> str:
    """A sweep for each row; writes the table of the best trials.

    Args:
      table: see ``configs/tables``.
      folder: where the sweeps go, each in a folder of its row's name.
      data_dir: where the data set lies.
      rows: as in `run`.
      search: see ``configs/searches``; one without a metric goes by the table's first.
      **keywords: ``trials`` and ``together`` of `experiments.sweep`.

    Returns:
      The table, of all rows with a search in the folder.
    """
    root = pathlib.Path(folder)
    name = search.get('metric') or metrics_of(table)[0].name
    wanted = {row: configs_of(table, row, seed=0) for row in runnable(table, rows)}
    for row, configs in wanted.items():
        print(f'{row}: search', flush=True)
        given = {**workdir.plain(search), 'metric': name}
        sweep.sweep(*configs, given, root / row, data_dir, **keywords)
    text = _best_trials(table, root, name)
    workdir.write_text(root / 'search.md', text + '\n')
    return text


def finals(
    table: Mapping[str, Any],
    folder: str | pathlib.Path,
    data_dir: str | None = None,
    rows: str = '',
    best: int = 2,
) -> str:
    """Trains the best trials of each row's search for the whole length; writes their table.

    The arguments are those of `search`; ``best`` says how many of each row.

    Returns:
      The table, of all rows with such trials in the folder.

    Raises:
      FileNotFoundError: if a row has not been searched.
      ValueError: as for `run`.
    """
    root, wanted = pathlib.Path(folder), {}
    for row in runnable(table, rows):
        file = root / row / 'sweep.json'
        if not file.exists():
            raise FileNotFoundError(f'{file} is not there: run --stage=search first.')
        for trial in json.loads(file.read_text())['trials'][:best]:
            configs = _configs_of_trial(table, row, trial)
            wanted[root / row / 'finals' / trial['trial']] = configs
    _train(wanted, root, data_dir)
    text = _trials_at_length(table, root)
    workdir.write_text(root / 'finals.md', text + '\n')
    return text


def _train(
    wanted: Mapping[pathlib.Path, Configs], root: pathlib.Path, data_dir: str | None
) -> None:
    """Trains in each folder what is wanted there, once all of it is checked."""
    for folder, configs in wanted.items():
        train.check(*configs, data_dir, folder)
    for folder, configs in wanted.items():
        print(folder.relative_to(root), flush=True)
        train.train_and_evaluate(*configs, folder, data_dir)


def _searches(table: Mapping[str, Any], root: pathlib.Path) -> dict[str, dict[str, Any]]:
    """What ``sweep.json`` says of each row that is searched in a folder."""
    files = {row: root / row / 'sweep.json' for row in runnable(table, '')}
    return {row: json.loads(file.read_text()) for row, file in files.items() if file.exists()}


def _best_trials(table: Mapping[str, Any], root: pathlib.Path, name: str) -> str:
    """A line for each search in a folder that went by this metric."""
    metric = _metric_of(table, name)
    ranked, notes = [], []
    for row, found in _searches(table, root).items():
        trials, by = found['trials'], found['search']['metric']
        configs = _configs_of_trial(table, row, trials[0])
        if why := _other(root / row / trials[0]['trial'], configs):
            notes.append(f'{row} {why}')
        elif by != name:
            notes.append(f'{row} is left out: its search went by {by}')
        else:
            ends = [metric.of({name: t['metric']}) for t in trials if 'stopped_at' not in t]
            second = metric.show(ends[1]) if len(ends) > 1 else ''
            counts = (str(len(trials)), str(len(ends)))
            cells = (row, metric.show(ends[0]), second, *counts, _settings(trials[0]))
            ranked.append((_rank(ends[0], found.get('largest', False)), cells))
    header = ('row', f'best {metric.header}', 'second', 'trials', 'to the end')
    lines = [cells for _, cells in sorted(ranked)]
    return _joined(report.markdown((*header, 'settings of the best'), lines), '\n'.join(notes))


def _trials_at_length(table: Mapping[str, Any], root: pathlib.Path) -> str:
    """A line for each trial in a folder that was trained for the whole length."""
    lines, notes, shorter, searched, whole = [], [], set(), set(), ''
    for row, found in _searches(table, root).items():
        name = found['search']['metric']
        metric = _metric_of(table, name)
        for place, trial in enumerate(found['trials'], 1):
            folder = root / row / 'finals' / trial['trial']
            if not (folder / 'summary.json').exists():
                continue
            configs = _configs_of_trial(table, row, trial)
            if why := _other(folder, configs):
                notes.append(f'{folder.relative_to(root)} {why}')
                continue
            summary = json.loads((folder / 'summary.json').read_text())
            ends = (own.show(own.of(summary)) for own in metrics_of(table))
            if 'stopped_at' in trial:  # its number is of another kind
                then = f'stopped at {trial["stopped_at"]}'
            else:
                then = metric.show(metric.of({name: trial['metric']}))
            lines.append([row, trial['trial'], str(place), then, *ends, _settings(trial)])
            shorter.add(_length(_held(root / row / trial['trial'])['task']))
            searched.add(metric.header)
            whole = _length(configs[0])
    at = f'at {" or ".join(sorted(shorter))}'
    header = ['row', 'trial', f'place {at}', f'{" or ".join(sorted(searched))} {at}']
    header += [f'{metric.header} at {whole}' for metric in metrics_of(table)]
    return _joined(report.markdown((*header, 'settings'), lines), '\n'.join(notes))


def _length(task: Mapping[str, Any]) -> str:
    unit = 'steps' if 'steps' in task else 'epochs'
    return f'{task[unit]} {unit}'


def _settings(trial: Mapping[str, Any]) -> str:
    drawn = trial['hyperparameters'].items()
    return ', '.join(f'{k}={v:.4g}' if isinstance(v, float) else f'{k}={v}' for k, v in drawn)


def _held(folder: pathlib.Path) -> dict[str, Any]:
    return json.loads((folder / 'config.json').read_text())


def _other(folder: pathlib.Path, configs: Configs) -> str:
    """Says so if the run in a folder is not of these configs, with the first difference."""
    task, optimizer = configs
    given = optimizers.without_search_space(optimizer)
    found = workdir.differences(_held(folder), task, given)
    return f'is left out: its configuration is another, {found[0]}' if found else ''


def _rank(best: float, largest: bool) -> float:
    """Sorts the best first, and last what left the numbers behind."""
    return math.inf if math.isnan(best) else -best if largest else best


def _joined(*parts: str) -> str:
    return '\n\n'.join(part for part in parts if part)


def run(
    table: Mapping[str, Any],
    folder: str | pathlib.Path,
    data_dir: str | None = None,
    rows: str = '',
    seeds: Sequence[int] = (0,),
) -> str:
    """Runs what is missing and writes the table of what is there.

    Args:
      table: see ``configs/tables``.
      folder: where the runs and the table go.
      data_dir: where the data set lies.
      rows: a regular expression that is searched for in the rows' names.
      seeds: of each row.

    Returns:
      The table.

    Raises:
      ValueError: if no row is meant, a config is wrong, or a folder holds a run of another one;
        nothing has been run then.
    """
    chosen, root = runnable(table, rows), pathlib.Path(folder)
    wanted = {
        root / row / f'seed_{seed}': configs_of(table, row, seed)
        for seed in seeds  # a whole table first
        for row in chosen
    }
    _train(wanted, root, data_dir)
    return write(table, root)


def write(table: Mapping[str, Any], root: pathlib.Path) -> str:
    """Writes the table of the runs in a folder that are through, and returns it.

    A run of other configs than the row has now is left out, and named.
    """
    entries = table['rows']
    runs, others = {}, []
    for row in entries:
        runs[row], left_out = _finished(table, row, root)
        others += left_out
    reference = table.get('reference', _REFERENCE)
    compared = runs.get(reference) or []
    every = [own for found in runs.values() for own in found]
    lines = [_line(table, row, runs[row], compared) for row in entries]
    lines += _baselines(table, every)
    lines.sort(key=lambda line: line[0])
    notes = [f'{_label(row, e)}: {e["note"]}' for row, e in entries.items() if e.get('note')]
    to = f'to {_label(reference, entries.get(reference, {}))}'
    costs = (name for cost, _ in _COSTS for name in (cost.header, to))
    header = (
        'optimizer',
        *(metric.header for metric in metrics_of(table)),
        'reported',
        'seeds',
        *costs,
    )
    text = _joined(
        report.markdown(header, [cells for _, cells in lines]),
        '\n'.join(notes),
        '\n'.join(others),
        report.environment_lines(every),
    )
    content = [{'label': own.label, 'config': own.config, 'summary': own.summary} for own in every]
    workdir.write_json(root / 'table.json', content)
    workdir.write_text(root / 'table.md', text + '\n')
    if every:
        report.plot([found[0] for found in runs.values() if found], root / 'table.png')
    return text


def _label(row: str, entry: Mapping[str, Any]) -> str:
    return entry.get('label', row.replace('_', ' '))


def _finished(
    table: Mapping[str, Any], row: str, root: pathlib.Path
) -> tuple[list[report.Run], list[str]]:
    """The runs of a row that are through, by seed; a line for each that is of other configs."""
    label, runs, others = _label(row, table['rows'][row]), [], []
    folders = sorted(file.parent for file in (root / row).glob('seed_*/config.json'))
    for folder, own in zip(folders, report.load(folders), strict=True):
        if own.summary:
            configs = configs_of(table, row, own.config['task']['seed'])
            if why := _other(folder, configs):
                others.append(f'{folder.relative_to(root)} {why}')
            else:
                runs.append(own._replace(label=label))
    return runs, others


def _cost(runs: Sequence[report.Run], cost: Metric) -> float:
    """The mean over the seeds; 0 where one of them does not know."""
    values = [own.summary.get(cost.name) or 0 for own in runs]
    return cost.scale * statistics.fmean(values) if values and all(values) else 0.0


def _spread(runs: Sequence[report.Run], metric: Metric) -> str:
    """The mean over the seeds, and half of what lies between the extremes."""
    values = [metric.of(own.summary) for own in runs]
    if any(math.isnan(value) for value in values):
        return 'nan'
    half = f' ± {metric.show((max(values) - min(values)) / 2)}' if len(values) > 1 else ''
    return f'{metric.show(statistics.fmean(values))}{half}'


def _baselines(
    table: Mapping[str, Any], runs: Sequence[report.Run]
) -> list[tuple[float, list[str]]]:
    """What the runs' summaries say of what learns nothing: a line, or none, of a table with one.

    The table's ``baseline`` has a ``label`` and, by a column's name, where its number stands.
    """
    if (entry := table.get('baseline')) is None:
        return []
    metrics, places = metrics_of(table), entry['metrics']
    wanted = [m._replace(name=places[m.name]) if m.name in places else None for m in metrics]
    found = {tuple(m and m.of(own.summary) for m in wanted) for own in runs}
    blank = [''] * (2 + 2 * len(_COSTS))
    return [
        (
            _rank(math.nan if values[0] is None else values[0], bool(table.get('largest'))),
            [
                entry['label'],
                *('' if v is None else m.show(v) for m, v in zip(metrics, values, strict=True)),
                *blank,
            ],
        )
        for values in sorted(found)
    ]


def _line(
    table: Mapping[str, Any], row: str, runs: Sequence[report.Run], compared: Sequence[report.Run]
) -> tuple[float, list[str]]:
    """What a row is sorted by, and its cells; ratios of costs with the seeds that both have."""
    entry, metrics = table['rows'][row], metrics_of(table)
    name, reported = _label(row, entry), entry.get('reported')
    paper = '' if reported is None else f'{reported:.2f} ({entry["confidence"]})'
    if not runs:
        blank = [''] * (len(metrics) - 1)
        return math.inf, [name, 'not run', *blank, paper, *[''] * (1 + 2 * len(_COSTS))]
    seeds, others = ({own.config['task']['seed'] for own in each} for each in (runs, compared))
    both = seeds & others
    here, there = (
        [own for own in each if own.config['task']['seed'] in both] for each in (runs, compared)
    )
    costs = []
    for cost, unit in _COSTS:
        mean, own, other = (_cost(each, cost) for each in (runs, here, there))
        costs.append(f'{mean:,.0f}{unit}' if mean else '')
        costs.append(f'{own / other:.2f}' if own and other else '')
    cells = [name, *(_spread(runs, metric) for metric in metrics), paper, str(len(runs)), *costs]
    best = statistics.fmean(metrics[0].of(own.summary) for own in runs)
    return _rank(best, bool(table.get('largest'))), cells


def main(argv: list[str]) -> None:
    """Runs the table of the flags and prints it."""
    main_lib.refuse_arguments(argv)
    flag = flags.FLAGS
    with main_lib.clear_errors():
        if not all(seed.isdigit() for seed in _SEEDS.value):
            raise ValueError(f'--seeds must be integers >= 0, got {",".join(_SEEDS.value)!r}.')
        table = _TABLE.value
        if _EPOCHS.value is not None:
            with table.unlocked():
                table.settings.epochs = _EPOCHS.value
        where = (table, flag.workdir, flag.data_dir, _ROWS.value)
        if _STAGE.value == 'search':
            text = search(*where, search=flag.search, trials=flag.trials, together=flag.together)
        elif _STAGE.value == 'finals':
            text = finals(*where, best=_BEST.value)
        else:
            text = run(*where, seeds=[int(seed) for seed in _SEEDS.value])
        print(text)


if __name__ == '__main__':
    main_lib.run(main, 'table', 'workdir')

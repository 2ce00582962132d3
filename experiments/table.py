"""Reruns a paper's table: each row for each seed, then the table and its figure.

python -m experiments.table --table=configs/tables/autoencoder.py --workdir=DIR --data_dir=DATA \\
    [--rows=REGEX] [--seeds=0,1,2]

A run is a workdir, DIR/ROW/seed_0 and so on. What is interrupted goes on by the same command, what
is there is not run again; rows and seeds may be added later. Writes DIR/table.md, table.json and
table.png (loss by step and by second) from all runs in DIR that are through.

The settings of its rows come from a search in two stages, with the same budget for each row:

python -m experiments.table --stage=search --epochs=10 --table=... --workdir=DIR --data_dir=DATA
python -m experiments.table --stage=finals --best=2 --table=... --workdir=DIR --data_dir=DATA

The first sweeps the ranges of each row's optimizer config into DIR/ROW, in shorter runs; it takes
--search, --trials and --together of `experiments.sweep`. The second trains the best of them for
the whole length, in DIR/ROW/finals.
"""

import importlib
import json
import math
import pathlib
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_dict, config_flags

from experiments import main as main_lib
from experiments import report, sweep, train, workdir

_TABLE = config_flags.DEFINE_config_file('table', None, 'Config file of the table.')
_ROWS = flags.DEFINE_string('rows', '', 'Which rows to run: a regular expression, searched for.')
_STAGE = flags.DEFINE_enum('stage', 'table', ['table', 'search', 'finals'], 'What to run.')
_EPOCHS = flags.DEFINE_integer('epochs', None, "In place of the task's.", lower_bound=1)
_BEST = flags.DEFINE_integer('best', 2, 'Trials of each search to run at length.', lower_bound=1)
_SEEDS = flags.DEFINE_list('seeds', ['0'], 'Seeds of the parameters and of the shuffling.')


class Metric(NamedTuple):
    """A number of a summary that a table shows."""

    name: str  # in the summary; 'a/b' is b in its group a
    header: str
    scale: float = 1.0  # 100 for per cent

    def of(self, summary: Mapping[str, Any]) -> float:
        """The scaled number; nan where the run left the numbers behind."""
        value: Any = summary
        for part in self.name.split('/'):
            value = value[part]
        return math.nan if value is None else self.scale * value


_COSTS = (
    (Metric('seconds', 'seconds'), ''),
    (Metric('state_bytes', 'state bytes'), ''),
    (Metric('program_bytes', 'memory', 2**-20), ' MiB'),
)
_REFERENCE = 'adam'  # the row to whose costs the others' are ratios, if a table names none


def metrics_of(table: Mapping[str, Any]) -> list[Metric]:
    """The columns of a table, the one that it is sorted by first."""
    return [Metric(*entry) for entry in table['metrics']]


def configs_of(
    table: Mapping[str, Any], row: str, seed: int
) -> tuple[config_dict.ConfigDict, config_dict.ConfigDict]:
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


def search(
    table: Mapping[str, Any],
    folder: str | pathlib.Path,
    data_dir: str | None = None,
    rows: str = '',
    **keywords: Any,
) -> str:
    """A sweep for each row; returns a line for the best trial of each.

    Args:
      table: see ``configs/tables``.
      folder: where the sweeps go, each in a folder of its row's name.
      data_dir: where the data set lies.
      rows: as in `run`.
      **keywords: ``search``, ``trials`` and ``together`` of `experiments.sweep`.

    Returns:
      The table of the best trials.
    """
    lines = []
    for row in runnable(table, rows):
        print(f'{row}: search', flush=True)
        task, optimizer = configs_of(table, row, seed=0)
        found = sweep.sweep(
            task, optimizer, workdir=pathlib.Path(folder) / row, data_dir=data_dir, **keywords
        )
        best, ended = found[0], sum('stopped_at' not in trial for trial in found)
        chosen = ', '.join(f'{k}={v:.4g}' for k, v in best['hyperparameters'].items())
        lines.append([row, f'{best["metric"]:.2f}', f'{len(found)}', f'{ended}', chosen])
    lines.sort(key=lambda line: float(line[1]), reverse=bool(table.get('largest')))
    return report.markdown(('row', 'best', 'trials', 'to the end', 'settings'), lines)


def finals(
    table: Mapping[str, Any],
    folder: str | pathlib.Path,
    data_dir: str | None = None,
    rows: str = '',
    best: int = 2,
) -> str:
    """Trains the best trials of each row's search for the whole length.

    The arguments are those of `search`; ``best`` says how many of each row.

    Raises:
      FileNotFoundError: if a row has not been searched.
    """
    wanted = []
    for row in runnable(table, rows):
        file = pathlib.Path(folder) / row / 'sweep.json'
        if not file.exists():
            raise FileNotFoundError(f'{file} is not there: run --stage=search first.')
        for trial in json.loads(file.read_text())['trials'][:best]:
            task, optimizer = configs_of(table, row, seed=0)
            optimizer.update(trial['hyperparameters'])
            wanted.append((row, trial['trial'], task, optimizer))
    lines, metrics = [], metrics_of(table)
    for row, trial, task, optimizer in wanted:
        print(f'{row}, trial {trial}', flush=True)
        place = pathlib.Path(folder) / row / 'finals' / trial
        summary = train.train_and_evaluate(task, optimizer, place, data_dir)
        lines.append([row, trial, *(f'{metric.of(summary):.2f}' for metric in metrics)])
    return report.markdown(('row', 'trial', *(metric.header for metric in metrics)), lines)


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
      ValueError: if no row is meant, or a config is wrong; nothing has been run then.
    """
    chosen = runnable(table, rows)
    wanted = [(row, seed) for seed in seeds for row in chosen]  # a whole table first
    root = pathlib.Path(folder)
    for row, seed in wanted:
        configs = configs_of(table, row, seed)
        train.check(*configs, data_dir)
    for row, seed in wanted:
        print(f'{row}, seed {seed}', flush=True)
        configs = configs_of(table, row, seed)
        train.train_and_evaluate(*configs, root / row / f'seed_{seed}', data_dir)
    return write(table, root)


def write(table: Mapping[str, Any], root: pathlib.Path) -> str:
    """Writes the table of the runs in a folder that are through, and returns it."""
    entries = table['rows']
    runs = {row: _finished(root / row, _label(row, entry)) for row, entry in entries.items()}
    reference = table.get('reference', _REFERENCE)
    compared = runs.get(reference) or []
    lines = [_line(table, row, runs[row], compared) for row in entries]
    lines.sort(key=lambda line: line[0])
    notes = [f'{_label(row, e)}: {e["note"]}' for row, e in entries.items() if e.get('note')]
    every = [own for found in runs.values() for own in found]
    to = f'to {_label(reference, entries.get(reference, {}))}'
    costs = (name for cost, _ in _COSTS for name in (cost.header, to))
    header = (
        'optimizer',
        *(metric.header for metric in metrics_of(table)),
        'reported',
        'seeds',
        *costs,
    )
    parts = [
        report.markdown(header, [cells for _, cells in lines]),
        '\n'.join(notes),
        report.environment_lines(every),
    ]
    text = '\n\n'.join(part for part in parts if part)
    content = [{'label': own.label, 'config': own.config, 'summary': own.summary} for own in every]
    workdir.write_json(root / 'table.json', content)
    workdir.write_text(root / 'table.md', text + '\n')
    if every:
        report.plot([found[0] for found in runs.values() if found], root / 'table.png')
    return text


def _label(row: str, entry: Mapping[str, Any]) -> str:
    return entry.get('label', row.replace('_', ' '))


def _finished(folder: pathlib.Path, label: str) -> list[report.Run]:
    """The runs of a row that are through, by seed."""
    runs = report.load(sorted(file.parent for file in folder.glob('seed_*/config.json')))
    return [own._replace(label=label) for own in runs if own.summary]


def _mean(runs: Sequence[report.Run], metric: Metric) -> float:
    return statistics.fmean(metric.of(own.summary) for own in runs)


def _spread(runs: Sequence[report.Run], metric: Metric) -> str:
    """The mean over the seeds, and half of what lies between the extremes."""
    values = [metric.of(own.summary) for own in runs]
    if any(math.isnan(value) for value in values):
        return 'nan'
    half = f' ± {(max(values) - min(values)) / 2:.2f}' if len(values) > 1 else ''
    return f'{statistics.fmean(values):.2f}{half}'


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
        ratio = f'{_mean(here, cost) / _mean(there, cost):.2f}' if both else ''
        costs += [f'{_mean(runs, cost):,.0f}{unit}', ratio]
    cells = [name, *(_spread(runs, metric) for metric in metrics), paper, str(len(runs)), *costs]
    best = _mean(runs, metrics[0])
    sign = -1 if table.get('largest') else 1
    return (math.inf if math.isnan(best) else sign * best), cells


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

"""One table and one plot from any number of runs.

python -m experiments.report DIR... [--output=REPORT]

A DIR is a run's workdir, or a folder with some below it. Writes REPORT.md, REPORT.json and
REPORT.png (loss, and accuracy where there is one, by epoch, or by step where there are none, and
by second) and prints the table. Runs that are not through are listed with the step they reached.
Taggers get a table of their accuracies, with the tagger that knows nothing but words beside them,
and the ten pairs of tags that the best run confuses most.
"""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import app, flags

from experiments import main as main_lib
from experiments import workdir

_OUTPUT = flags.DEFINE_string('output', 'report', 'Path of the report, without ending.')


class Run(NamedTuple):
    """What a workdir holds."""

    label: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any]


def find(folders: Sequence[str]) -> list[pathlib.Path]:
    """The workdirs among and below the folders.

    Raises:
      FileNotFoundError: if a folder has none.
    """
    found: dict[pathlib.Path, None] = {}  # an ordered set
    for folder in map(pathlib.Path, folders):
        below = sorted(file.parent.resolve() for file in folder.rglob('config.json'))
        if not below:
            raise FileNotFoundError(f'{folder} holds no run: no config.json is in or below it.')
        found.update(dict.fromkeys(below))
    return list(found)


def load(folders: Sequence[pathlib.Path]) -> list[Run]:
    """The runs, labelled by their optimizer and by what tells them apart."""
    configs = [json.loads((folder / 'config.json').read_text()) for folder in folders]
    labels = _labels(configs)
    labels = [
        f'{label} ({folder.name})' if labels.count(label) > 1 else label
        for folder, label in zip(folders, labels, strict=True)
    ]
    runs = []
    for folder, config, label in zip(folders, configs, labels, strict=True):
        end = folder / 'summary.json'
        summary = json.loads(end.read_text()) if end.exists() else {}
        runs.append(Run(label, config, workdir.read_metrics(folder), summary))
    return runs


def _labels(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Each optimizer's name with the settings in which the runs differ."""
    flat = [
        {
            f'{group}.{key}': value
            for group in ('task', 'optimizer')
            for key, value in c[group].items()
        }
        for c in configs
    ]
    labels = []
    for own in flat:
        name = own['optimizer.name']
        alike = [other for other in flat if other['optimizer.name'] == name]
        differing = [
            f'{key.split(".")[1]}={_short(value)}'
            for key, value in own.items()
            if any(other.get(key) != value for other in alike)
            or (key.startswith('task.') and any(other.get(key) != value for other in flat))
        ]
        labels.append(' '.join([name, *differing]))
    return labels


def _short(value: Any) -> str:
    return f'{value:.4g}' if isinstance(value, float) else str(value)


def by_loss(runs: Sequence[Run]) -> list[Run]:
    """Best final loss first; then runs that left the numbers behind; then unfinished ones."""

    def key(run: Run) -> tuple[bool, float]:
        loss = run.summary.get('train_loss')
        return not run.summary, math.inf if loss is None else loss

    return sorted(runs, key=key)


def table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, best final loss first, unfinished runs last."""
    losses = ['train_loss', 'test_loss']
    if any('dev_loss' in run.summary for run in runs):
        losses.insert(1, 'dev_loss')
    if any('validation_loss' in run.summary for run in runs):  # language models have no test text
        known = [name for name in losses if any(name in run.summary for run in runs)]
        losses = [*known, 'validation_loss']
    costs = ['seconds', 'steps/s', 'state bytes', 'skipped']
    header = ['run', *(name.replace('_', ' ') for name in losses), *costs]
    rows = []
    for run in by_loss(runs):
        end = run.summary
        if not end:
            step = run.metrics[-1]['step'] if run.metrics else 0
            rows.append([run.label, f'at step {step}', *[''] * (len(header) - 2)])
            continue
        rows.append(
            [
                run.label,
                *(_loss(end, name) for name in losses),
                f'{end["seconds"]:.1f}',
                f'{end["steps_per_second"]:.1f}',
                f'{end["state_bytes"]:,}',
                str(end['notfinite']),
            ]
        )
    return header, rows


def _loss(summary: dict[str, Any], name: str) -> str:
    if name not in summary:
        return ''
    return 'nan' if summary[name] is None else f'{summary[name]:.3f}'


def by_accuracy(runs: Sequence[Run]) -> list[Run]:
    """The runs that are through and say how accurate they were on dev, the best first."""
    found = [run for run in runs if run.summary.get('best_dev_accuracy') is not None]
    return sorted(found, key=lambda run: -run.summary['best_dev_accuracy'])


def accuracies(runs: Sequence[Run]) -> str:
    """Of taggers: accuracies at the best of dev, in %, and what the best run confuses at its end.

    Empty if there are none. With ROOT: as the papers count, see `tasks.pos_tagging.loss.ratios`.
    """
    ranked = by_accuracy(runs)
    if not ranked:
        return ''
    names = ('dev_accuracy', 'test_accuracy', 'dev_accuracy_with_root', 'dev_sentence_accuracy')
    rows = []
    for run in ranked:
        best = run.summary['at_best_dev']
        cells = [f'{100 * best[name]:.2f}' for name in names]
        rows.append([run.label, str(run.summary['best_dev_step']), *cells])
    baselines = {tuple(run.summary['most_frequent_tag'].values()) for run in ranked}
    rows += [
        ['most frequent tag', '', *(f'{100 * part:.2f}' for part in own), '', '']
        for own in sorted(baselines)
    ]
    header = ['run', 'best at step', 'dev %', 'test %', 'dev with ROOT %', 'dev sentences %']
    worst = [[f'{a} as {b}', str(n)] for a, b, n in ranked[0].summary['dev_confusions']]
    title = f'Most frequent errors on dev of {ranked[0].label}, at the end of the run:'
    parts = [markdown(header, rows), title, markdown(['tag', 'tokens'], worst)]
    return '\n\n'.join(parts)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that reads well as plain text too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return '| ' + ' | '.join(cells) + ' |'

    dashes = ['-' * w if i == 0 else '-' * (w - 1) + ':' for i, w in enumerate(widths)]
    return '\n'.join([line(header), line(dashes), *map(line, rows)])


def plot(runs: Sequence[Run], file: pathlib.Path) -> None:
    """Training loss by epoch, or step, and by second, logarithmic, best run first in the legend.

    Below it the accuracy on dev, if any run logged it. The legend is beside them, however large.
    """
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot, rcsetup

    quantities = {'loss': 'training loss, mean since the last log line'}
    if any('dev_accuracy' in row for run in runs for row in run.metrics):
        quantities['dev_accuracy'] = 'accuracy on dev'
    in_epochs = all('epoch' in row for run in runs for row in run.metrics)
    against = {'epoch' if in_epochs else 'step': '', 'seconds': ' of training'}
    shown = [run for run in by_loss(runs) if run.metrics]
    # Inches that the legend needs.
    width = 0.6 + 0.07 * max((len(run.label) for run in shown), default=0)
    height = 0.3 + 0.2 * len(shown)
    figure, grid = pyplot.subplots(
        len(quantities),
        2,
        figsize=(12 + width, max(4.5 * len(quantities), height)),
        sharey='row',
        layout='constrained',
        squeeze=False,
    )
    colors = matplotlib.rcParams['axes.prop_cycle']
    for axis in grid.flat:
        axis.set_prop_cycle(rcsetup.cycler(linestyle=['-', '--', ':', '-.']) * colors)
    for axes, (name, label) in zip(grid, quantities.items(), strict=True):
        for run in shown:
            rows = [row for row in run.metrics if name in row]
            values = [math.nan if row[name] is None else row[name] for row in rows]
            for axis, x in zip(axes, against, strict=True):
                axis.plot([row[x] for row in rows], values, label=run.label, linewidth=1.2)
        for axis, (x, more) in zip(axes, against.items(), strict=True):
            axis.set(xlabel=x + more, yscale='log' if name == 'loss' else 'linear')
            axis.yaxis.set_major_formatter('{x:g}')
            axis.yaxis.set_minor_formatter('{x:g}')
            axis.grid(visible=True, which='both', alpha=0.25)
        axes[0].set_ylabel(label)
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(),
        loc='outside right upper',
        fontsize='small',
    )
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def report(folders: Sequence[str], output: str) -> str:
    """Writes the report of the runs in ``folders`` and returns its text."""
    runs = load(find(folders))
    header, rows = table(runs)
    base = pathlib.Path(output)
    base.parent.mkdir(parents=True, exist_ok=True)
    parts = [markdown(header, rows), accuracies(runs), environment_lines(runs)]
    text = '\n\n'.join(part for part in parts if part)
    base.with_name(base.name + '.md').write_text(text + '\n')
    content = [{'label': run.label, 'config': run.config, 'summary': run.summary} for run in runs]
    workdir.write_json(base.with_name(base.name + '.json'), content)
    image = base.with_name(base.name + '.png')
    plot(runs, image)
    return f'{text}\n\nplot: {image}'


def environment_lines(runs: Sequence[Run]) -> str:
    """A line for each machine, set of versions and commit that any of the runs had."""
    environments = {
        json.dumps(environment, sort_keys=True)
        for run in runs
        for environment in (run.config['environment'], *run.config.get('resumed_in', ()))
    }
    return '\n'.join(_environment_line(json.loads(each)) for each in sorted(environments))


def _environment_line(environment: dict[str, Any]) -> str:
    versions = ', '.join(f'{k} {v}' for k, v in environment['versions'].items() if v)
    flags = environment.get('xla_flags')
    return (
        f'{environment["num_devices"]} x {environment["device"]}, {environment["num_cpus"]} CPUs; '
        f'Python {environment["python"]}, {versions}; commit {environment["commit"]}'
        + (f'; XLA_FLAGS {flags}' if flags else '')
    )


def main(argv: list[str]) -> None:
    """Prints the report of the folders on the command line."""
    if len(argv) < 2:
        raise app.UsageError('give at least one workdir')
    with main_lib.clear_errors():
        print(report(argv[1:], _OUTPUT.value))


if __name__ == '__main__':
    app.run(main)

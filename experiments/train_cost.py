"""What a step of training takes, whole, with each of a table's rows: as a ratio to Adam's.

python -m experiments.train_cost --table=configs/tables/autoencoder.py --data_dir=DATA \\
    [--rows=REGEX] [--turns=10] [--steps_per_turn=20] [--workdir=DIR]

A row's runs tell how long they took, but on a machine that may have done other things meanwhile.
Here all rows train in turn, a segment of some steps each, from the gradient to the new parameters,
in an order that is drawn for each turn; medians over the turns are shown, and the 10th and 90th
percentiles. `experiments.step_cost` has the optimizer's part alone. A segment should hold the
turns of methods that do something every few steps. Those that begin after some steps
(``start_step``) take these first, uncounted. Of a task whose batches come from the host, the first
one is taken again and again.

With --workdir, the numbers go to train_cost.json there, and the table to train_cost.md.
"""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import main as main_lib
from experiments import optimizers, program, report, segments, table, train, workdir

_TURNS = flags.DEFINE_integer('turns', 10, 'Timed segments of each row.', lower_bound=1)
_STEPS = flags.DEFINE_integer('steps_per_turn', 20, 'Steps of a segment.', lower_bound=1)


class _Row:
    """A run of a row's, a segment after the other."""

    def __init__(
        self, task: Any, config: Mapping[str, Any], optimizer: Mapping[str, Any], steps: int
    ) -> None:
        made = program.single(task, config, optimizer)
        self._steps, self._carry = steps, jax.jit(made.initial)()
        if task.stream is None:
            self._data, self._calls = task.train_data, 1
            segment = segments.make_segment(task, made.step, config['seed'])
            lowered = segment.lower(self._carry, self._data, length=steps)
        else:
            self._data, self._calls = next(task.stream.batches(0)), steps
            lowered = segments.single_step(made.step, None).lower(self._carry, self._data)
        self._segment = lowered.compile()
        self.seconds: list[float] = []
        for _ in range(-(-(optimizer.get('start_step') or 0) // steps)):
            self.run()
        self.seconds.clear()

    def run(self) -> None:
        """Takes a segment, and notes the seconds of a step."""
        clock = time.perf_counter()
        for _ in range(self._calls):
            self._carry, _ = self._segment(self._carry, self._data)
        jax.block_until_ready(self._carry)
        self.seconds.append((time.perf_counter() - clock) / self._steps)


def measure(
    entries: Mapping[str, Any], rows: list[str], turns: int, steps: int, data_dir: str | None
) -> dict[str, list[float]]:
    """Seconds of a step in each turn, by row.

    Args:
      entries: a table, see ``configs/tables``.
      rows: their names, the reference first.
      turns: how many count; there is one before.
      steps: of a segment.
      data_dir: where the data set lies.

    Returns:
      For each row as many numbers.
    """
    made = {}
    for name in rows:
        config, optimizer = table.configs_of(entries, name, seed=0)
        task = train.check(config, optimizer, data_dir)
        made[name] = _Row(task, config, optimizers.without_search_space(optimizer), steps)
    shuffle = np.random.default_rng(0)
    for turn in range(1 + turns):
        for name in shuffle.permutation(rows):
            made[name].run()
            if turn == 0:
                made[name].seconds.clear()
    return {name: row.seconds for name, row in made.items()}


def render(entries: Mapping[str, Any], found: Mapping[str, list[float]]) -> str:
    """The table, by the median; ratios to the first row's."""

    def label(row: str) -> str:
        return entries['rows'][row].get('label', row)

    first = next(iter(found))
    reference, lines = statistics.median(found[first]), []
    for name, seconds in sorted(found.items(), key=lambda own: statistics.median(own[1])):
        low, high = (1e3 * np.percentile(seconds, p, method='inverted_cdf') for p in (10, 90))
        median = statistics.median(seconds)
        times = (f'{1e3 * median:.1f}', f'{low:.1f} to {high:.1f}')
        lines.append([label(name), *times, f'{median / reference:.2f}'])
    header = ['optimizer', 'ms per step', 'p10 to p90', f'ratio to {label(first)}']
    return report.markdown(header, lines)


def main(argv: list[str]) -> None:
    """Measures the rows of the flags and prints the table."""
    main_lib.refuse_arguments(argv)
    flag = flags.FLAGS
    with main_lib.clear_errors():
        entries = flag.table
        reference = entries.get('reference', 'adam')
        rows = list(dict.fromkeys([reference, *table.runnable(entries, flag.rows)]))
        found = measure(entries, rows, _TURNS.value, _STEPS.value, flag.data_dir)
    content = {'seconds_per_step': found, 'steps': _STEPS.value}
    workdir.save_tables(flag.workdir, 'train_cost', content, render(entries, found))


if __name__ == '__main__':
    main_lib.run(main, 'table')

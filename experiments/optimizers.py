"""From an optimizer config to an Optax transformation."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

import precond_optax
from precond_optax import layout as layout_lib
from precond_optax import leafwise
from precond_optax.kernels import calls

FACTORIES: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    'adafactor': optax.adafactor,
    'adagrad': optax.adagrad,
    'adam': optax.adam,
    'adamw': optax.adamw,
    'block_adam': precond_optax.block_adam,
    'mbag': precond_optax.mbag,
    'muon': optax.contrib.muon,
    'rmsprop': optax.rmsprop,
    'schedule_free_adamw': optax.contrib.schedule_free_adamw,
    'sgd': optax.sgd,
    'shampoo': precond_optax.shampoo,
    'shared_basis': precond_optax.shared_basis,
    'sketchy': precond_optax.sketchy,
    'soaa': precond_optax.soaa,
    'sonew': precond_optax.sonew,
}


def has_kernels(config: Mapping[str, Any]) -> bool:
    """Whether an optimizer goes through a kernel here, which the compiler cannot share out."""
    if 'impl' not in inspect.signature(FACTORIES[config['name']]).parameters:
        return False
    return calls.is_wanted(config.get('impl', 'auto'))


def make(
    config: Mapping[str, Any],
    schedule: Callable[..., optax.Schedule],
    num_steps: int,
    layout: Mapping[str, precond_optax.LeafRule] | None = None,
) -> optax.GradientTransformation:
    """The optimizer that a config describes.

    Args:
      config: ``name``, ``learning_rate`` (the peak), and the factory's other keywords, floats of
        which may be traced. A ``total_steps`` that is there and None is the run's; with
        ``anneal=False`` the learning rate stays at its peak after the warm-up; ``schedules`` name
        floats that go from one value to another over the run, as ``dict(b2=(0.9, 0.99))``;
        ``layout`` has rules before the task's, as ``(('mlp', dict(band=4)),)``; a ``search_space``
        is for the sweep.
      schedule: the task's schedule of the learning rate, from its peak; takes ``anneal=False``.
      num_steps: the steps of the whole run.
      layout: the task's, for factories that take one. Of Optax's, Muon is told by it which axes
        are a matrix's; by itself it takes leaves of two axes alone, so none of a stack.

    Returns:
      The transformation.

    Raises:
      ValueError: if the name or a keyword is unknown, or the learning rate is no number >= 0.
    """
    arguments = without_search_space(config)
    name = arguments.pop('name', None)
    if name not in FACTORIES:
        raise ValueError(f'optimizer.name must be one of {sorted(FACTORIES)}, got {name!r}.')
    peak = arguments.pop('learning_rate', None)
    is_number = isinstance(peak, float | int) and not isinstance(peak, bool)
    if not isinstance(peak, jax.core.Tracer) and (not is_number or not 0 <= peak < math.inf):
        raise ValueError(f'optimizer.learning_rate must be a number >= 0, got {peak!r}.')
    keywords = {} if arguments.pop('anneal', True) else {'anneal': False}
    if arguments.get('total_steps', num_steps) is None:
        arguments['total_steps'] = num_steps
    rules = _rules(arguments.pop('layout', ()))
    layout = rules | {k: rule for k, rule in (layout or {}).items() if k not in rules} or None
    factory, schedules = FACTORIES[name], arguments.pop('schedules', {})
    parameters = inspect.signature(factory).parameters
    if layout is not None and 'layout' in parameters:
        arguments['layout'] = layout
    elif layout is not None and name == 'muon':
        arguments['muon_weight_dimension_numbers'] = functools.partial(matrices, layout=layout)
    if schedules:
        if unknown := sorted(set(schedules) - set(arguments)):
            raise ValueError(
                f'optimizer.schedules are of {sorted(arguments)}, got {unknown} for {name!r}.'
            )
        # In bfloat16, a parameter's dtype, b2 = 0.999 would be 1.
        static = set(parameters) - set(schedules)
        factory = optax.inject_hyperparams(factory, static, hyperparam_dtype=jnp.float32)
    try:
        for key, ends in schedules.items():
            arguments[key] = optax.linear_schedule(*ends, num_steps)
        return factory(learning_rate=schedule(peak, **keywords), **arguments)
    except TypeError as error:
        raise ValueError(f'optimizer {name!r} does not take these keywords: {error}.') from error


def _rules(given: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, precond_optax.LeafRule]:
    """The rules of a config's ``layout``."""
    try:
        return {pattern: precond_optax.LeafRule(**rule) for pattern, rule in given}
    except (TypeError, ValueError) as error:
        raise ValueError(
            'optimizer.layout must be pairs of a pattern and the fields of a LeafRule, got '
            f'{given!r}: {error}'
        ) from error


def matrices(params: optax.Params, layout: Mapping[str, precond_optax.LeafRule]) -> Any:
    """For each leaf that is preconditioned and a matrix, batch axes aside, its axes for Muon."""

    def axes(path: tuple[Any, ...], leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        facts = layout_lib.leaf_layout(leafwise.path_string(path), leaf, layout)
        if not facts.precondition or len(facts.groups) != 2:
            return None
        return optax.contrib.MuonDimensionNumbers(*facts.groups)

    return jax.tree_util.tree_map_with_path(axes, params)


def without_search_space(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what only the sweep reads."""
    return {name: value for name, value in config.items() if name != 'search_space'}


def evaluated(state: optax.OptState, params: optax.Params) -> optax.Params:
    """The parameters to evaluate: a schedule-free optimizer's are not those that it trains."""
    kind = optax.contrib.ScheduleFreeState
    for node in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind)):
        if isinstance(node, kind):
            return optax.contrib.schedule_free_eval_params(node, params)
    return params

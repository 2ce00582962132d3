"""One row for each public factory: every generic check runs on every row."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import optax

import precond_optax
from precond_optax import LeafRule


@dataclasses.dataclass(frozen=True)
class Case:
    """A factory and what the checks need to know of it.

    Attributes:
      name: of the test.
      factory: from a learning rate and keywords, the transformation.
      learning_rate: at which the checks train.
      keywords: further arguments.
      static_args: arguments that cannot be injected.
      real_only: whether complex leaves are refused.
      state_bytes: of state for each entry of a (6, 4) float32 leaf.
      compressed: whether the state has arrays of other shapes than the leaf's.
      layout: whether the factory has a ``layout`` with batch axes.
      scale_free: whether updates do not change with the scale of the gradients.
      floats: arguments that must be traced where hyperparameters are injected.
      momentum: the argument that is the decay of the mean of the gradients.
      spreads_nan: whether a NaN in one leaf is one in all: by sums over the whole tree.
      variant: whether another row of the factory is enough but for the generic checks, which are
        slow tests then.
    """

    name: str
    factory: Callable[..., optax.GradientTransformation]
    learning_rate: float = 1e-2
    keywords: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    static_args: tuple[str, ...] = ()
    real_only: bool = True
    state_bytes: float = 8
    compressed: bool = False
    layout: bool = True
    scale_free: bool = True
    floats: tuple[str, ...] = ('learning_rate', 'b1', 'b2', 'eps')
    momentum: str = 'b1'
    spreads_nan: bool = False
    variant: bool = False

    def make(self, learning_rate: Any = None, **keywords: Any) -> optax.GradientTransformation:
        """The transformation, with other keywords where given."""
        rate = self.learning_rate if learning_rate is None else learning_rate
        return self.factory(learning_rate=rate, **{**self.keywords, **keywords})


# In the first steps H has rank one up to eps, so S is a difference of nearly equal numbers and the
# direction carries their rounding. Checks that compare two ways of computing the same want an eps
# well above it; the kernels' own tests take small ones.
_EPS = {'eps': 0.1}

_SHARED_BASIS_STATIC = (
    'rank',
    'power_iterations',
    'oversampling',
    'update_every',
    'max_block_dim',
    'seed',
)

_MBAG_STATIC = ('block_size', 'root_every', 'newton_schulz_steps', 'root')


def _mbag(name: str, learning_rate: float, state_bytes: float, **keywords: Any) -> Case:
    # Gradients in one direction, as some checks have, leave a condition for many steps.
    start = {'block_size': 4, 'root_every': 2, 'newton_schulz_steps': 25, 'damping': 1.0}
    return Case(
        name,
        precond_optax.mbag,
        learning_rate,
        keywords=start | keywords,
        static_args=_MBAG_STATIC,
        state_bytes=state_bytes,
        compressed=True,
        scale_free=False,  # the damping is not
        floats=('learning_rate', 'momentum', 'damping', *set(keywords) & {'decay'}),
        momentum='momentum',
        variant=name != 'mbag',
    )


def _kronecker(
    name: str, factory: Callable[..., Any], state_bytes: float, **keywords: Any
) -> Case:
    """Shampoo's or Sketchy's row: blocks that do not divide the axes, roots of some steps ago."""
    return Case(
        name,
        factory,
        keywords={'eps': 0.1, 'block_size': 3, 'update_every': 2, **keywords},
        static_args=('block_size', 'update_every', 'max_dim', *set(keywords) & {'rank', 'root'}),
        state_bytes=state_bytes,
        compressed=True,
        variant=name not in ('shampoo', 'sketchy'),
    )


# Where gradients are large its direction is one over them; its sums are the whole tree's.
_SOAA = dict(
    layout=False,
    scale_free=False,
    floats=('learning_rate', 'b1', 'b2', 'gamma', 'eps', 'total_steps'),
    spreads_nan=True,
)

# The control: what Optax's own Adam does not pass is no fair check.
ADAM = Case('adam', optax.adam, real_only=False, layout=False)

CASES = (
    ADAM,
    Case('sonew', precond_optax.sonew, keywords=_EPS, static_args=('band',), state_bytes=12),
    Case(
        'sonew_diagonal',
        precond_optax.sonew,
        variant=True,
        keywords={'band': 0, **_EPS},
        static_args=('band',),
    ),
    Case(
        'sonew_band_4',
        precond_optax.sonew,
        keywords={'band': 4, **_EPS},
        static_args=('band',),
        state_bytes=24,
        variant=True,
    ),
    Case(
        'sonew_bfloat16_stats',
        precond_optax.sonew,
        variant=True,
        keywords={'stats_dtype': 'bfloat16', **_EPS},
        static_args=('band', 'stats_dtype'),
        layout=False,  # layers of a stack are rounded by other random numbers than alone
    ),
    Case(
        'sonew_order_c',
        precond_optax.sonew,
        variant=True,
        keywords={**_EPS, 'order': 'C', 'weight_decay': 1e-4, 'relative_eps': 1e-6},
        static_args=('band',),
        state_bytes=12,
        scale_free=False,  # the decay is not
    ),
    Case(
        'sonew_graft_rmsprop',
        precond_optax.sonew,
        variant=True,
        keywords={**_EPS, 'graft': 'rmsprop_normalized'},
        static_args=('band',),
        state_bytes=16,
    ),
    Case(
        'sonew_delayed_graft',
        precond_optax.sonew,
        variant=True,
        keywords={**_EPS, 'delayed_graft': True},
        static_args=('band',),
        state_bytes=12,
    ),
    Case(
        'sonew_routed',
        precond_optax.sonew,
        variant=True,
        keywords={'layout': {'': LeafRule(precondition=False)}},
        static_args=('band',),
        layout=False,
    ),
    Case(
        'shared_basis',
        precond_optax.shared_basis,
        keywords={**_EPS, 'rank': 2},
        static_args=_SHARED_BASIS_STATIC,
        state_bytes=16,
        compressed=True,
    ),
    _mbag('mbag', 0.03, state_bytes=36),
    _mbag('mbag_ema', 0.01, state_bytes=36, decay=0.9),
    _mbag('mbag_n', 1.0, state_bytes=20, root=False, damping=10.0),
    Case(
        'block_adam',
        precond_optax.block_adam,
        keywords={**_EPS, 'block_size': 3},
        static_args=('block_size', 'root_every'),
        state_bytes=16,
        compressed=True,
    ),
    _kronecker('shampoo', precond_optax.shampoo, 32),
    _kronecker('shampoo_newton', precond_optax.shampoo, 32, root='newton_schulz'),
    _kronecker('shampoo_each_step', precond_optax.shampoo, 32, update_every=1, start_step=1),
    _kronecker('sketchy', precond_optax.sketchy, 20, rank=2),
    Case('soaa', precond_optax.soaa, keywords={'total_steps': 1000}, **_SOAA),
    Case(
        'soaa_centered',
        precond_optax.soaa,
        variant=True,
        keywords={'total_steps': 1000, 'fisher': 'centered'},
        state_bytes=12,
        **_SOAA,
    ),
)

# The rows of Optax's own tests and of meshes and checkpoints, one or two of each factory.
TABLE = tuple(case for case in CASES if not case.variant)
BY_NAME = {case.name: case for case in CASES}

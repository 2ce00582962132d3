r"""SONew, the sparsified online Newton method: state, transformation, alias."""

import functools
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from precond_optax import checks, grafting, leafwise, placement
from precond_optax import layout as layout_lib
from precond_optax.checks import Scalar
from precond_optax.kernels import banded, calls, diagonal, fused, rounding, tridiagonal, verbs
from precond_optax.layout import LeafLayout

# Special forms by the number of off-diagonals; all others are banded.
_KERNELS: dict[int, types.ModuleType] = {0: diagonal, 1: tridiagonal}
_PATTERNS = {0: 'diagonal', 1: 'tridiagonal'}


class ScaleBySonewState(NamedTuple):
    """State of ``scale_by_sonew``."""

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=int32: steps taken
    mu: optax.Updates  # like the parameters, of mu_dtype: mean of the gradients
    nu: optax.Updates  # like the parameters, of stats_dtype: mean of their squares
    # `band` trees like the parameters, of stats_dtype: tree k holds the mean of g_j g_{j+k+1};
    # optax.MaskedNode() where a leaf is no chain or has fewer bands.
    offdiag: tuple[optax.Updates, ...]
    graft: optax.OptState  # the grafting rule's own state, if it has any
    # shape=(batch axes...), dtype=float32 at least: ||w|| / ||u|| of each chain in the last step;
    # without delayed_graft, and where a leaf is no chain, optax.MaskedNode()
    graft_scale: optax.Updates
    # shape=(leaves,), dtype=float32: edges of each leaf dropped in the last step; with
    # diagnostics=False optax.MaskedNode()
    dropped_edges: Any


def _edge_tolerance(stats_dtype: jnp.dtype) -> float:
    """The least share of a_j that a Schur complement keeps: about the statistics' rounding."""
    decided = {'float32': 1e-7, 'bfloat16': 0.0078}
    return decided.get(stats_dtype.name, float(jnp.finfo(stats_dtype).eps))


def _widest_band(band: int, layout: layout_lib.Layout) -> int:
    """The most off-diagonals that a leaf can have: known without the leaves, as the state is."""
    rules = layout.values() if isinstance(layout, Mapping) else ()
    return max([band, *(rule.band for rule in rules if rule.band is not None)])


def _padded(arrays: Sequence[Any], count: int) -> tuple[Any, ...]:
    return (*arrays, *(optax.MaskedNode() for _ in range(count - len(arrays))))


def scale_by_sonew(  # noqa: D417 (its arguments are those of `sonew`)
    b1: Scalar = 0.9,
    b2: Scalar = 0.9,
    eps: Scalar = 1e-16,
    *,
    mean_eps: Scalar | None = 0.1,
    relative_eps: Scalar | None = None,
    nesterov: bool = False,
    band: int = 1,
    order: str = 'F',
    edge_tolerance: Scalar | None = None,
    graft: grafting.Graft = 'adam',
    delayed_graft: bool = False,
    mu_dtype: Any | None = None,
    stats_dtype: Any | None = None,
    stochastic_rounding: bool = True,
    layout: layout_lib.Layout = None,
    diagnostics: bool = False,
    impl: str = 'auto',
) -> optax.GradientTransformationExtraArgs:
    """The direction of SONew, to be subtracted; no learning rate and no weight decay.

    The math is in `sonew`. The direction has the shapes and dtypes of the gradients, and the
    units of the grafting rule's: none for Adam's.

    Args:
      b1, b2, eps, mean_eps, relative_eps, nesterov, band, order, edge_tolerance, graft,
        delayed_graft, mu_dtype, stats_dtype, stochastic_rounding, layout, diagnostics, impl: as in
        `sonew`, with the same defaults.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with state `ScaleBySonewState`.

    Raises:
      ValueError: if an argument is out of its range; at ``init``, if a leaf cannot be taken.

    Example:
      >>> import jax.numpy as jnp, optax, precond_optax
      >>> tx = optax.chain(precond_optax.scale_by_sonew(), optax.scale(-1e-3))
      >>> params = {'kernel': jnp.ones((3, 2)), 'bias': jnp.ones(2)}
      >>> updates, state = tx.update(params, tx.init(params))
      >>> print(optax.tree.norm(updates['bias']) < 2e-3)
      True

    References:
      See `sonew`.
    """
    checks.in_range('b1', b1, 0, 1)
    checks.in_range('b2', b2, 0, 1)
    checks.in_range('eps', eps, 0)
    for name, value in (('mean_eps', mean_eps), ('relative_eps', relative_eps)):
        if value is not None:
            checks.in_range(name, value, 0)
    if edge_tolerance is not None:
        checks.in_range('edge_tolerance', edge_tolerance, 0, 1)
    checks.flag('nesterov', nesterov)
    checks.static_int('band', band, 0)
    checks.one_of('order', order, ('F', 'C'))
    checks.float_dtype('mu_dtype', mu_dtype)
    checks.float_dtype('stats_dtype', stats_dtype)
    checks.flag('stochastic_rounding', stochastic_rounding)
    checks.flag('diagnostics', diagnostics)
    checks.one_of('impl', impl, calls.IMPLS)
    grafting.check(graft)
    checks.flag('delayed_graft', delayed_graft)
    if delayed_graft and graft is None:
        raise ValueError('delayed_graft=True wants a grafting rule, got graft=None.')
    layout_lib.check(layout)
    widest = _widest_band(band, layout)
    # None, not zero, is the default: optax.inject_hyperparams would trace that.
    more_eps: Scalar = 0.0 if relative_eps is None else relative_eps

    def band_of(facts: LeafLayout) -> int:
        """The leaf's off-diagonals: no more than its chain has."""
        asked = band if facts.band is None else facts.band
        if asked > widest:
            raise ValueError(
                f'{facts.path}: the layout function asks for band={asked}, but may not ask for '
                f'more than the transformation has: pass band={asked} and lower it elsewhere.'
            )
        return min(asked, facts.size - 1) if facts.precondition else 0

    def init_leaf(leaf: Any, facts: LeafLayout) -> leafwise.Fields:
        stored = stats_dtype or facts.compute_dtype
        held = [jnp.zeros_like(leaf, dtype=stored) for _ in range(1 + band_of(facts))]
        return {
            'mu': jnp.zeros_like(leaf, dtype=mu_dtype or facts.dtype),
            'nu': held[0],
            'offdiag': _padded(held[1:], widest),
            'graft_scale': scale_of(leaf, facts),
        }

    def scale_of(leaf: Any, facts: LeafLayout) -> Any:
        if not (delayed_graft and facts.precondition):
            return optax.MaskedNode()
        axes = tuple(range(facts.batch_axes))
        return placement.zeros(leaf, facts.shape[: facts.batch_axes], facts.compute_dtype, axes)

    def grafted(
        direction: jax.Array,
        sizes: Sequence[jax.Array],
        state: ScaleBySonewState,
        facts: LeafLayout,
    ) -> tuple[jax.Array, leafwise.Fields]:
        """The direction in the size that the rule gives it, by the norms of u and of w."""
        size, wanted = sizes
        if not delayed_graft:
            return grafting.resize(direction, size, wanted), {}
        scale = wanted / jnp.where(size > 0, size, 1)
        changed = {'graft_scale': jnp.squeeze(scale, facts.axes)}
        return direction * jnp.expand_dims(state.graft_scale, facts.axes), changed

    def tolerance(facts: LeafLayout) -> Scalar:
        if edge_tolerance is not None:
            return edge_tolerance
        return _edge_tolerance(jnp.dtype(stats_dtype or facts.compute_dtype))

    def eps_of(grad: jax.Array, state: ScaleBySonewState, facts: LeafLayout) -> Scalar:
        """What is added to the diagonal: a number, or one for each chain, its axes of size 1."""
        if mean_eps is None:
            return eps
        nu, _ = diagonal.accumulate(grad, state.nu, (), b2=b2, axes=facts.axes)
        mean = jnp.sum(nu, axis=facts.axes, keepdims=True) * (1 / facts.size)
        return eps + mean_eps / (1 - b2**state.count) * mean

    def scalars_of(state: ScaleBySonewState, facts: LeafLayout) -> verbs.Scalars:
        mu_correction, nu_correction = 1 / (1 - b1**state.count), 1 / (1 - b2**state.count)
        grad_correction: Scalar = 0.0
        if nesterov:
            grad_correction = (1 - b1) * mu_correction
            mu_correction = b1 / (1 - b1 ** (state.count + 1))
        corrections = mu_correction, nu_correction
        return verbs.Scalars(
            *(b1, b2, *corrections, eps, tolerance(facts), grad_correction, more_eps)
        )

    def fits_kernel(facts: LeafLayout) -> bool:
        """Whether a leaf goes through the kernel."""
        dtypes = [facts.dtype, mu_dtype, stats_dtype, *facts.stored.values()]
        plain = {jnp.dtype(d).name for d in dtypes if d is not None} <= {'float32', 'bfloat16'}
        if diagnostics or not plain or not facts.precondition or not calls.is_wanted(impl):
            return False
        axes = facts.chain_axes(facts.order or order)
        return fused.is_taken(facts.shape, facts.batch_axes, axes, band_of(facts))

    def in_one_pass(
        grad: jax.Array,
        state: ScaleBySonewState,
        facts: LeafLayout,
        param: jax.Array | None = None,
        move: verbs.Move | None = None,
    ) -> tuple[jax.Array, leafwise.Fields]:
        """The direction, or the parameter moved along it; and what changes."""
        # As they are stored: leafwise has made them wide, which the compiler takes back.
        stored = facts.stored['nu']
        nu, *held = (x.astype(stored) for x in (state.nu, *state.offdiag[: band_of(facts)]))
        scalars = scalars_of(state, facts)
        own_eps = eps_of(grad, state, facts)
        batch = facts.shape[: facts.batch_axes]
        fields = [('nu', 0), *(('offdiag', k) for k in range(len(held)))]
        drawn = fields if stochastic_rounding and stored == jnp.bfloat16 else []
        seeds = [
            rounding.seeds(leafwise.rounding_key(facts.path, *field, state.count))
            for field in drawn
        ]
        leaf = fused.Static(
            _KERNELS.get(len(held), banded),
            facts.batch_axes,
            tuple(facts.chain_axes(facts.order or order)),
            grafting.ADAM_EPS if graft == 'adam' else None,
            nesterov,
            relative=not checks.is_static_zero(more_eps),
            interpreted=impl == 'pallas',
            moves=move is not None,
        )
        if move is not None:
            scale = jnp.ones(batch) if graft is None else state.graft_scale
            move = verbs.Move(jnp.full(batch, move.keep), move.step * scale)
        run = calls.guarded(functools.partial(fused.one_pass, leaf), 'SONew')
        mu, nu, offdiag, moved, squares = run(
            grad.astype(facts.dtype),
            state.mu.astype(facts.stored['mu']),
            nu,
            tuple(held),
            jax.tree.map(jnp.asarray, scalars),
            jnp.full(batch, own_eps) if mean_eps is None else jnp.squeeze(own_eps, facts.axes),
            jnp.stack(seeds) if seeds else jnp.zeros((0, 2), jnp.uint32),
            param,
            move,
        )
        changed: leafwise.Fields = {'mu': mu, 'nu': nu, 'offdiag': _padded(offdiag, widest)}
        if graft is not None:
            # Of u and of w, for each chain.
            sizes = [jnp.expand_dims(jnp.sqrt(squares[..., i]), facts.axes) for i in range(2)]
            if graft not in ('adam', 'momentum'):
                sizes[1] = grafting.norm(state.graft, facts.axes)
            grown, scale = grafted(moved, sizes, state, facts)
            moved = grown if move is None else moved
            changed |= scale
        return moved, changed

    def apply_leaf(
        grad: jax.Array,
        state: ScaleBySonewState,
        facts: LeafLayout,
        param: jax.Array,
        move: verbs.Move,
    ) -> tuple[jax.Array, leafwise.Fields] | None:
        is_known = graft is None or delayed_graft  # how far to go, before the kernel has run
        plain = param.dtype in (jnp.float32, jnp.bfloat16)
        if is_known and plain and fits_kernel(facts) and calls.is_placed(impl, grad):
            return in_one_pass(grad, state, facts, param, move)
        return None

    def update_leaf(
        grad: jax.Array, state: ScaleBySonewState, facts: LeafLayout
    ) -> tuple[jax.Array, leafwise.Fields]:
        if fits_kernel(facts) and calls.is_placed(impl, grad):
            return in_one_pass(grad, state, facts)
        axes, bands = facts.chain_axes(facts.order or order), band_of(facts)
        scalars = scalars_of(state, facts)
        if not facts.precondition:
            mu = b1 * state.mu + (1 - b1) * grad
            nu, _ = diagonal.accumulate(grad, state.nu, (), b2=b2, axes=axes)
            both = (scalars.mu_hat(mu, grad, nesterov), nu * scalars.nu_correction)
            return grafting.adam_direction(*both), {'mu': mu, 'nu': nu}
        scalars = scalars._replace(eps=eps_of(grad, state, facts))
        new = verbs.step(
            _KERNELS.get(bands, banded),
            *(grad, state.mu, state.nu, state.offdiag[:bands], scalars),
            nesterov=nesterov,
            axes=axes,
        )
        direction = new.direction
        changed = {'mu': new.mu, 'nu': new.nu, 'offdiag': _padded(new.offdiag, widest)}
        if graft is not None:
            magnitude = grafting.magnitude(graft, new.mu_hat, new.nu_hat, state.graft)
            sizes = [grafting.norm(x, facts.axes) for x in (direction, magnitude)]
            direction, scale = grafted(direction, sizes, state, facts)
            changed |= scale
        if diagnostics:
            # An edge of weight zero is none; of the others the factors lack the dropped ones.
            pairs = zip(new.offdiag, new.psi, strict=True)
            changed['dropped_edges'] = sum(
                jnp.sum((e != 0) & (p == 0), dtype=jnp.float32) for e, p in pairs
            )
        return direction, changed

    def describe(facts: LeafLayout) -> str:
        if not facts.precondition:
            return 'Adam direction'
        bands = band_of(facts)
        pattern = _PATTERNS.get(bands, f'{bands} bands')
        chains = math.prod(facts.shape[: facts.batch_axes])
        how = ''
        if fits_kernel(facts):
            how = ', in one pass' + ('' if checks.is_static_zero(more_eps) else ' after another')
            how += ' where it may' if jax.device_count() > 1 else ''
        return f'{pattern}, {chains} x {facts.size}, order {facts.order or order}{how}'

    return leafwise.leafwise(
        ScaleBySonewState,
        init_leaf,
        update_leaf,
        apply_leaf=apply_leaf,
        layout=layout,
        stacked={'offdiag': widest},
        stochastic=('nu', 'offdiag') if stochastic_rounding else (),
        gathered={'dropped_edges': diagnostics},
        graft=grafting.transformation(graft, b2, layout),
        describe=describe,
        axes=lambda facts: {'graft_scale': tuple(range(facts.batch_axes))},
    )


def sonew(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.9,
    eps: Scalar = 1e-16,
    *,
    mean_eps: Scalar | None = 0.1,
    relative_eps: Scalar | None = None,
    nesterov: bool = False,
    band: int = 1,
    order: str = 'F',
    edge_tolerance: Scalar | None = None,
    graft: grafting.Graft = 'adam',
    delayed_graft: bool = False,
    mu_dtype: Any | None = None,
    stats_dtype: Any | None = None,
    stochastic_rounding: bool = True,
    layout: layout_lib.Layout = None,
    diagnostics: bool = False,
    impl: str = 'auto',
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SONew: a sparse inverse of the gradients' second moment, at nearly Adam's cost.

    The entries of a leaf are lined up in a chain. Of the second moment :math:`H` of the chain
    only the diagonal and ``band`` off-diagonals are kept; the preconditioner :math:`X` is the
    positive definite matrix, zero outside that band, of least LogDet divergence to
    :math:`H^{-1}`. It is the one whose inverse has the same band as :math:`H`.

    .. math::
      m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
      H_t &= \beta_2 H_{t-1} + (1 - \beta_2)\, \mathrm{band}(g_t g_t^T) \\
      X_t &= L D L^T \quad \text{with } \mathrm{band}(X_t^{-1}) = \mathrm{band}(\hat H_t)
             + \epsilon_t I \\
      u_t &= X_t \hat m_t \\
      \theta_{t+1} &= \theta_t - \alpha_t \left( u_t \|w_t\| / \|u_t\|
             + \lambda \theta_t \right)

    with bias-corrected :math:`\hat m, \hat H`; :math:`\epsilon_t` is ``eps``, ``mean_eps`` times
    the mean of :math:`\hat H`'s diagonal, and what ``relative_eps`` adds; :math:`w` is the update
    of the grafting rule, by default Adam's, leaf by leaf. A learning rate found for Adam carries
    over. Leaves with one axis or none (biases, norms) get Adam's direction.

    While the gradients seen so far are few or nearly the same, :math:`H` is nearly singular
    and a few entries of a leaf can get most of its update: warm the learning rate up, or raise
    ``mean_eps``.

    State beside the parameters: ``2 + band`` arrays of each preconditioned leaf's shape; Adam
    has 2. ``precond_optax.plan`` lists it before anything is allocated.

    Args:
      learning_rate: the step size, a number or a schedule.
      b1: decay of the mean of the gradients, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the diagonal, in units of squared gradients, >= 0. The default is the square of
        Adam's, and counts where gradients vanish. Far above the squared gradients it leaves the
        mean of the gradients as the direction.
      mean_eps: added to the diagonal, in units of the mean of the second moment over the chain,
        >= 0: a loss of another scale has the same direction. None: none.
      relative_eps: the same, in units of the largest absolute row sum of the second moment of the
        chain. None: none.
      nesterov: whether the mean of the gradients, in Adam's grafting too, looks one step ahead, as
        in ``optax.nadam``.
      band: off-diagonals kept, >= 0: 0 is the diagonal method, 1 the tridiagonal one, more the
        banded one. Each costs one more array of state; time and workspace grow with its square.
        A leaf gets no more than its chain has. With ``optax.inject_hyperparams`` all floats may
        be traced; pass ``static_args=('band',)`` and there also name mu_dtype, stats_dtype, a
        layout function or a mask, where you give one.
      order: along which axis the chain runs first. 'F': the first, so along the inputs of one
        output neuron of a Flax kernel, and on to the next neuron. 'C': the last.
      edge_tolerance: an edge of the chain whose Schur complement is not above this share of the
        diagonal is dropped, in [0, 1). None: 1e-7 for float32 statistics, 0.0078 for bfloat16,
        the rounding unit for others.
      graft: where the size of the update comes from: 'adam', 'momentum', 'sgd',
        'rmsprop_normalized', any ``optax.GradientTransformation``, or None for SONew's own.
      delayed_graft: whether the ratio of the two norms is that of the step before, so that no
        pass over memory has to wait for them, see `update_and_apply`. In the first step, which
        has none before it, preconditioned leaves do not move.
      mu_dtype: dtype in which the mean of the gradients is stored; None: the parameter's. What is
        rounded there is amplified as the direction is: for wide bands float32 is more exact.
      stats_dtype: dtype in which the second moment is stored; None: the parameter's, but float32
        at least.
      stochastic_rounding: whether statistics stored in bfloat16 are rounded stochastically, so
        that increments below their precision are not lost. Drawn from the step count and the
        leaf's path: a resumed run draws the same.
      layout: what the shapes do not tell. A mapping from regular expressions, searched for in
        a leaf's path ('encoder/0/kernel'), to `LeafRule`, first match wins; or a function
        ``(path, leaf) -> LeafRule | None``, which may lower a leaf's band but not raise it.
      diagnostics: whether the state's ``dropped_edges`` counts, leaf by leaf, the edges that the
        last step dropped. Costs nothing when off.
      impl: 'pallas': leaves that can go through a kernel do, in one pass over memory; 'xla': none
        does; 'auto': the first on TPUs. The kernels take up to eight bands, float32 and bfloat16,
        and no ``diagnostics``; ``mean_eps`` and ``relative_eps`` are passes before, which read.
        On a TPU leaves of two or three axes that fill its tiles, whose chain runs first along the
        first axis or along the one that it holds last; on a GPU order 'F' in leaves of two axes
        or more. What a kernel does not take is XLA's. So is, on several devices, what the
        compiler shares out: the kernel runs where the mesh's axes are Explicit, or after
        `explicit_sharding`; 'auto' does not guess, so it is XLA's as well where there is no mesh.
        In a ``shard_map`` or ``pmap`` all is XLA's. The results are the same to rounding. With
        'pallas' CPUs interpret the TPU's kernel. An update cannot be differentiated through it.
      weight_decay: decoupled, as in ``optax.adamw``, >= 0, or a schedule.
      mask: which leaves decay, as in ``optax.adamw``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Update dtypes follow the gradients'.

    Raises:
      ValueError: if an argument is out of its range; at ``init``, if a leaf is not of a floating
        dtype or does not fit its rule, with its path.

    Example:
      >>> import jax, jax.numpy as jnp, optax, precond_optax
      >>> def f(x): return jnp.sum((x - 1.0) ** 2)
      >>> tx = precond_optax.sonew(learning_rate=0.1)
      >>> params = jnp.zeros((3, 2))
      >>> state = tx.init(params)
      >>> for _ in range(100):
      ...   updates, state = tx.update(jax.grad(f)(params), state)
      ...   params = optax.apply_updates(params, updates)
      >>> print(f'{f(params):.1f}')
      0.0

    References:
      Devvrit et al., `A Computationally Efficient Sparsified Online Newton Method
      <https://arxiv.org/abs/2311.10085>`_, NeurIPS 2023: equation (5) and Algorithm 1 (the
      subproblem and the step), Theorem 3.1 (tridiagonal), Theorem 3.2 (banded), Algorithm 3
      (dropped edges).
      ``X`` here is their :math:`X_t`, the diagonal of ``D`` their :math:`D_{jj}`.
    """
    direction = scale_by_sonew(
        b1,
        b2,
        eps,
        mean_eps=mean_eps,
        relative_eps=relative_eps,
        nesterov=nesterov,
        band=band,
        order=order,
        edge_tolerance=edge_tolerance,
        graft=graft,
        delayed_graft=delayed_graft,
        mu_dtype=mu_dtype,
        stats_dtype=stats_dtype,
        stochastic_rounding=stochastic_rounding,
        layout=layout,
        diagnostics=diagnostics,
        impl=impl,
    )
    return leafwise.chain_learning_rate(direction, learning_rate, weight_decay, mask)

"""What a step costs: what is measured, and how it is shown."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from absl import flags

import precond_optax
from experiments import step_cost, tpu_compile

TINY = step_cost.Tree('tiny', {'kernel': (8, 4), 'bias': (4,)})


def measured(tree=TINY, rounds=2, **keywords):
    return {'parameters': 36} | step_cost.measure(tree, rounds, copied=1000, **keywords)


@pytest.mark.slow
def test_every_optimizer_is_measured():
    result = measured()
    steps = {step['optimizer']: step for step in result['steps']}
    assert list(steps) == list(step_cost.OPTIMIZERS)
    assert all(len(step['seconds']) == 2 for step in result['steps'])
    state = {name: step['state_bytes_per_parameter'] for name, step in steps.items()}
    # Two moments of each entry, one off-diagonal of the kernel's 32 of 36, and the step counts.
    assert state['adam'] == (2 * 4 * 36 + 4) / 36
    assert state['sonew, tridiagonal'] == (2 * 4 * 36 + 4 * 32 + 4) / 36
    # Two moments; basis, coefficients, roots and residuals of the kernel; two counts for 2 leaves.
    blocks = 8 * 8 + 2 * 4 * 8 * 8 + 4
    assert state['shared, rank 8'] == pytest.approx((2 * 36 + blocks + 2 + 2) * 4 / 36)
    text = step_cost.render({'tiny': result})
    assert '| sonew, tridiagonal ' in text
    assert '| shared, rank 32, every 10 ' in text


def test_adam_is_first_and_beside_it_what_is_asked_for():
    methods = step_cost.chosen('optimizers', 'diagonal$|^adam', step_cost.OPTIMIZERS)
    assert methods == ['adam', 'sonew, diagonal', 'sonew, tridiagonal']
    result = measured(rounds=1, methods=['sonew, diagonal', 'adam'])
    assert [step['optimizer'] for step in result['steps']] == ['adam', 'sonew, diagonal']
    assert [len(step['seconds']) for step in result['steps']] == [1, 1]
    assert result['copy_bytes_per_second'] > 0
    # Adam at least reads g, m, v and p and writes m, v and p, and its count.
    least = result['steps'][0]['least_bytes_per_parameter']
    assert least == pytest.approx((28 * 36 + 2 * 4) / 36)


def test_all_steps_of_one_optimizer_after_each_other():
    result = measured(rounds=3, in_turn=False, methods=[])
    assert [len(step['seconds']) for step in result['steps']] == [3]


@pytest.mark.parametrize('in_turn', [True, False])
def test_each_turn_has_an_order_of_its_own(in_turn, monkeypatch):
    """Drawn from a seed; with --noin_turn there is one turn."""
    steps = []

    def noted(name):
        def update(updates, state, params=None):
            jax.debug.callback(lambda: steps.append(name))
            return updates, state

        return lambda _: optax.GradientTransformation(lambda params: (), update)

    for name in ('adam', 'b', 'c'):
        monkeypatch.setitem(step_cost.OPTIMIZERS, name, noted(name))

    def order():
        result = measured(rounds=6, in_turn=in_turn, methods=['b', 'c'])
        jax.effects_barrier()
        assert [step['optimizer'] for step in result['steps']] == ['adam', 'b', 'c']
        taken = tuple(steps[3:])  # the first of each is not timed
        steps.clear()
        return taken

    first = order()
    assert order() == first
    if in_turn:
        turns = [first[i : i + 3] for i in range(0, 18, 3)]
        assert {tuple(sorted(turn)) for turn in turns} == {('adam', 'b', 'c')}
        assert len({turn[0] for turn in turns}) > 1
    else:
        assert [len(set(first[i : i + 6])) for i in (0, 6, 12)] == [1, 1, 1]


def test_blocks_large_trees_and_kernels_are_left_out_unless_asked_for():
    defaults = {flag: flags.FLAGS[flag].default for flag in ('optimizers', 'tree')}
    methods = step_cost.chosen('optimizers', defaults['optimizers'], step_cost.OPTIMIZERS)
    blocks = ('shared', 'mbag', 'block', 'shampoo', 'sketchy')
    assert methods == [n for n in step_cost.OPTIMIZERS if not n.startswith(blocks)]
    assert not set(step_cost.OPTIMIZERS) & set(step_cost.IN_ONE_PASS)
    trees = step_cost.chosen('tree', defaults['tree'], step_cost.TREES)
    assert trees == ['leaf4096', 'autoencoder']


@pytest.mark.parametrize('pattern', ['adamant', '('])
def test_an_expression_that_finds_nothing(pattern):
    with pytest.raises(ValueError, match=f'--optimizers={re.escape(repr(pattern))} is '):
        step_cost.chosen('optimizers', pattern, step_cost.OPTIMIZERS)


def test_percentiles_ratios_and_shares_are_shown():
    sizes = {'temporary_bytes_per_parameter': 0.5, 'compile_seconds': 2.0}
    steps = [
        {
            'optimizer': 'adam',
            'seconds': [1.0] * 100,
            'state_bytes_per_parameter': 8.0,
            'least_bytes_per_parameter': 28.0,
        },
        {
            'optimizer': 'spikes',
            'seconds': [2.0] * 10 + [3.0] * 88 + [5.0, 9.0],
            'state_bytes_per_parameter': 12.0,
            'least_bytes_per_parameter': 36.0,
        },
    ]
    result = {'parameters': 10, 'copy_bytes_per_second': 480.0}
    result['steps'] = [step | sizes for step in steps]
    text = step_cost.render({'tree': result})
    cells = [cell.strip() for cell in text.splitlines()[-1].strip('|').split('|')]
    # 360 bytes take 0.75 s of 3.
    shown = ['spikes', '3000.00', '2000.00 to 3000.00', '5000.00', '3.00', '0.250']
    assert cells == [*shown, '36.00', '12.00', '0.50', '2.0']


def test_what_a_compiler_says_is_shown_and_what_it_refuses(monkeypatch):
    """Its facts here are another compiler's: of one leaf, for this machine."""
    real = tpu_compile.measure

    def measure(tx, params):
        if len(params) > 1:
            raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: no room\nfor it')
        return real(tx, jax.device_put(jax.tree.map(jnp.ones_like, params), here))

    monkeypatch.setattr(tpu_compile, 'measure', measure)
    mesh = jax.sharding.Mesh(jax.devices()[:1], 'x')
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    monkeypatch.setattr(
        tpu_compile,
        'one_leaf',
        lambda shape, _: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=here),
    )
    leaf = step_cost.TREES['leaf4096']._replace(shapes={'kernel': (64, 32)})
    monkeypatch.setitem(step_cost.TREES, 'leaf4096', leaf)
    found = {
        tree.title: step_cost.compiled_for('v5e:2x2', tree, ['adafactor'])
        for tree in (leaf, step_cost.TREES['autoencoder'])
    }
    assert list(found[leaf.title]) == ['adam', 'adafactor']
    text = step_cost.render_compiled(found)
    adam = next(line for line in text.splitlines() if line.startswith('| adam '))
    cells = [cell.strip() for cell in adam.strip('|').split('|')]
    # Parameters, gradients, two moments; parameters and moments written in place.
    assert cells[2:4] == ['28.0', '16.0']
    assert 'adam: RESOURCE_EXHAUSTED: no room' in text


def test_the_trees():
    count = {name: step_cost._count(tree) for name, tree in step_cost.TREES.items()}
    assert count['autoencoder'] == 2_837_314
    assert count['lm_1b'] == tpu_compile.COUNT
    # Embedding, output, last norm; in each layer attention, two kernels and biases, two norms.
    layer = 4 * 512 * 512 + 2 * 512 * 2048 + 2048 + 512 + 4 * 512
    assert count['pos_tagging'] == 35_858 * 512 + 513 * 835 + 2 * 512 + 6 * layer
    small = 4 * 64 * 64 + 2 * 64 * 256 + 256 + 64 + 4 * 64
    assert count['pos_tagging_small'] == 3_355 * 64 + 65 * 15 + 2 * 64 + 2 * small


@pytest.mark.parametrize('name', ['pos_tagging', 'pos_tagging_small', 'lm_1b'])
def test_the_layouts_fit_their_trees(name):
    tree = step_cost.TREES[name]
    params = {
        path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in tree.shapes.items()
    }
    plan = precond_optax.plan(step_cost.OPTIMIZERS['shared, rank 8'](tree.layout), params)
    assert not plan.unmatched_rules
    treatments = {leaf.path: leaf.treatment for leaf in plan.leaves}
    assert not next(treatments[p] for p in treatments if 'embed' in p).startswith('shared basis')
    if name == 'pos_tagging':
        whole = 'shared basis, 512 blocks of 512, rank 8'
        assert treatments['layer_5/attention/query/kernel'] == whole
        assert treatments['layer_5/attention/out/kernel'] == whole
        assert treatments['output/kernel'] == 'shared basis, 835 blocks of 512, rank 8'
    # Muon takes matrices: kernels, of a stack each layer's.
    numbers = step_cost.optimizers.matrices(params, tree.layout)
    taken = {path for path in params if numbers[path] is not None}
    kernels = {path for path in params if path.startswith('layers/mlp/') and 'scale' not in path}
    kernels |= {path for path in params if re.search('dense_./kernel|query/kernel', path)}
    assert len(kernels) == {'pos_tagging': 18, 'pos_tagging_small': 6, 'lm_1b': 3}[name]
    assert kernels <= taken
    assert not any('scale' in path or 'bias' in path or 'embed' in path for path in taken)

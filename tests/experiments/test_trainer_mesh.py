"""The trainer in meshes, in microbatches, interrupted, and resumed on another mesh."""

import functools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments import mesh as mesh_lib
from experiments import program as program_lib
from experiments import segments, tasks, telemetry, train
from experiments import workdir as workdir_lib
from precond_optax.kernels import cuts, fused
from tests.compiled import bytes_by_device
from tests.experiments import stand_in
from tests.experiments.small import config_of, lines, small_task, without_clock

MESHES = ((8, 1, 1), (2, 2, 2), (1, 8, 1), (1, 2, 4))
STEPS = 3


@pytest.fixture(autouse=True)
def _known_task(monkeypatch):
    monkeypatch.setitem(tasks._MODULES, 'stand_in', 'tests.experiments.stand_in')


def task_config(mesh=None, **changes):
    config = stand_in.get_config()
    with config.unlocked():
        config.update(changes)
        if mesh is not None:
            config.mesh = dict(zip(mesh_lib.AXES, mesh, strict=True))
    return config


def optimizer_config(name):
    config = config_of('optimizers', name)
    if name != 'adamw':
        config.eps = 0.1  # as in WORKSPACE.md: rounding in the first steps
    return config


def steps_of(name, mesh=None, optimizer=None, **changes):
    """The carry after some steps, without a workdir, and what they told."""
    config = task_config(mesh, **changes)
    task = tasks.make(config, None)
    program = program_lib.single(task, config, {**optimizer_config(name), **(optimizer or {})})
    made = None if mesh is None else mesh_lib.of(config)
    with jax.set_mesh(made) if made is not None else jax.default_device(jax.devices()[0]):
        carry = jax.jit(program.initial, out_shardings=program.shardings)()
        run = segments.make(task, program.step, 0, program.shardings)
        run.compile(carry, [STEPS])
        carry, told = run(carry, 0, STEPS, telemetry.Watch())
    return program, carry, told


@functools.cache
def on_one_device(name):
    _, carry, told = steps_of(name)
    return jax.device_get((carry, told))


def assert_near(got, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5),
        jax.device_get(got),
        expected,
    )


QUICK = {('adamw', (8, 1, 1)), ('adamw', (2, 2, 2)), ('sonew', (1, 2, 4))}
QUICK |= {('shared_basis', (2, 2, 2))}


@pytest.mark.parametrize(
    ('name', 'mesh'),
    [
        pytest.param(name, mesh, marks=() if (name, mesh) in QUICK else pytest.mark.slow)
        for name in ('adamw', 'sonew', 'shared_basis')
        for mesh in MESHES
    ],
)
def test_eight_devices_equal_one(name, mesh):
    carry, told = on_one_device(name)
    program, got, got_told = steps_of(name, mesh)
    assert_near((got.params, got_told), (carry.params, told))
    if name != 'shared_basis':  # whose directions without gradients are anyone's
        assert_near(got.opt_state, carry.opt_state)
    # Each array is where it was put, and stays there through the steps.
    jax.tree.map(
        lambda x, place: (
            x.sharding.is_equivalent_to(place, x.ndim)
            or pytest.fail(f'{x.shape} is on {x.sharding}, not on {place}')
        ),
        got,
        program.shardings,
    )
    _, fsdp, tensor = mesh
    up = got.params['layers']['up']
    layers, width, hidden = up.shape
    shard = (layers, width // fsdp, hidden // tensor)
    assert {s.data.shape for s in up.addressable_shards} == {shard}
    shapes = {x.shape for x in jax.tree.leaves(got.params) if x.ndim > 1}
    mirrored = [x for x in jax.tree.leaves(got) if x.shape in shapes]
    held, whole = max(bytes_by_device(mirrored).values()), sum(x.nbytes for x in mirrored)
    # 'odd' is never cut along its 3 heads.
    assert held <= whole / (fsdp * tensor) + 3 * 3 * 8 * 4 * len(mirrored) / len(shapes)
    # Coefficients of the shared basis and their roots, k^2 numbers for each output.
    others = [x for x in jax.tree.leaves(got) if x.size >= 300 and x.shape[-1] >= 64]
    assert bool(others) == (name == 'shared_basis')
    for x in others:
        assert max(bytes_by_device(x).values()) == x.nbytes // (fsdp * tensor), x.shape


def test_in_a_mesh_kernels_run_on_each_device_s_part(monkeypatch):
    """Of an optimizer that has some: the program tells it where everything lies."""
    carry, told = on_one_device('sonew')
    real, leaves = fused.one_pass, []
    monkeypatch.setattr(cuts, 'LANES', 4)  # so that the small leaves fill tiles
    monkeypatch.setattr(cuts, 'SUBLANES', 2)
    monkeypatch.setattr(
        fused, 'one_pass', lambda *args: leaves.append(args[1].shape) or real(*args)
    )
    _, got, got_told = steps_of('sonew', (1, 2, 4), optimizer=dict(impl='pallas'))
    assert_near((got, got_told), (carry, told))
    assert {carry.params['layers'][name].shape for name in ('up', 'down')} <= set(leaves)


@pytest.mark.parametrize(('mesh', 'count'), [(None, 4), ((2, 2, 2), 2)])
def test_microbatches_are_the_batch(mesh, count):
    carry, told = on_one_device('adamw')
    _, got, got_told = steps_of('adamw', mesh, accumulation=count)
    assert_near((got, got_told), (carry, told))


def test_microbatches_hold_every_example_once_and_their_number():
    """And sums of bfloat16 gradients are in float32: in bfloat16 256 + 1 would be 256."""
    seen = []

    def loss(params, batch):
        jax.debug.callback(
            lambda x, i, s: seen.append((int(i), x.tolist(), int(s))),
            batch['x'],
            batch['microbatch'],
            batch['step'],
            ordered=True,
        )
        return params * jnp.sum(batch['g'])

    batch = {'x': np.arange(8), 'g': np.array([256, 1, 0, 0, 0, 0, 1, 0], np.float32), 'step': 5}
    value, grad = jax.jit(program_lib.gradients(loss, 4))(jnp.ones([], jnp.bfloat16), batch)
    jax.effects_barrier()
    assert seen == [(0, [0, 4], 5), (1, [1, 5], 5), (2, [2, 6], 5), (3, [3, 7], 5)]
    assert float(value) == 64.5
    assert grad.dtype == jnp.bfloat16
    assert float(grad) == 64.5


def trained(folder, config, name='adamw', **keywords):
    return train.train_and_evaluate(
        config, optimizer_config(name), folder, progress=False, **keywords
    )


@pytest.fixture(scope='module')
def whole_run(tmp_path_factory):
    """The log and the checkpoints of a run on one device that nothing interrupts."""
    folder = tmp_path_factory.mktemp('whole')
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tasks._MODULES, 'stand_in', 'tests.experiments.stand_in')
        trained(folder, task_config(max_to_keep=9))
    return folder


def assert_same_curve(folder, other):
    rows, expected = lines(folder), lines(other)
    assert [row['step'] for row in rows] == [row['step'] for row in expected] == [*range(1, 13)]
    for name in ('loss', 'grad_norm', 'learning_rate'):
        got, wanted = ([row[name] for row in log] for log in (rows, expected))
        np.testing.assert_allclose(got, wanted, rtol=1e-4, err_msg=name)


def saved(folder, step):
    """A checkpoint as it lies on the disk."""
    with ocp.CheckpointManager(folder / 'checkpoints') as manager:
        names = ocp.args.Composite(carry=ocp.args.StandardRestore())
        return jax.device_get(manager.restore(step, args=names)['carry'])


def test_a_checkpoint_written_in_the_background_is_of_its_step(whole_run):
    """Later steps take the arrays' memory while it is being written."""
    kept = sorted(int(p.name) for p in (whole_run / 'checkpoints').iterdir() if p.name.isdigit())
    assert kept == [2, 4, 6, 8, 10, 12]
    config = task_config()
    task = tasks.make(config, None)
    program = program_lib.single(task, config, optimizer_config('adamw'))
    carry = jax.jit(program.initial)()
    run = segments.make(task, program.step, 0)
    run.compile(carry, [2])
    for step in kept:
        carry, _ = run(carry, step - 2, 2, telemetry.Watch())
        held = saved(whole_run, step)
        assert int(held['step']) == step
        jax.tree.map(np.testing.assert_array_equal, held['params'], jax.device_get(carry.params))


def test_artifacts_lie_beside_the_checkpoints_and_must_stay(whole_run, tmp_path):
    assert (whole_run / 'tokenizer.model').read_bytes() == b'its letters'
    workdir_lib.Workdir(tmp_path, {'a': 1}, {}, {'tokenizer.model': b'x'})
    workdir_lib.Workdir(tmp_path, {'a': 1}, {}, {'tokenizer.model': b'x'})
    with pytest.raises(ValueError, match=r'tokenizer.model is not what the data give now'):
        workdir_lib.Workdir(tmp_path, {'a': 1}, {}, {'tokenizer.model': b'y'})


def test_resumed_on_other_meshes(whole_run, tmp_path, monkeypatch):
    """Eight devices, then four, then one: the same curve; what is restored is what was saved."""
    trained(tmp_path, task_config((2, 2, 2)), stop_after=4)
    before = saved(tmp_path, 4)
    restored = []
    real = workdir_lib.Workdir.restore

    def restore(self, like):
        carry, seconds = real(self, like)
        restored.append(jax.device_get(carry))
        devices = [len(x.sharding.device_set) for x in jax.tree.leaves(carry)]
        restored.append(set(devices))
        return carry, seconds

    monkeypatch.setattr(workdir_lib.Workdir, 'restore', restore)
    with monkeypatch.context() as patch:
        four = functools.partial(mesh_lib.make, devices=jax.devices()[:4])
        patch.setattr(mesh_lib, 'make', four)
        trained(tmp_path, task_config((1, 2, 2)), stop_after=8)
    assert restored[1] == {4}
    jax.tree.map(np.testing.assert_array_equal, restored[0].params, before['params'])
    # Read without a target, a checkpoint has dicts for tuples, and these in another order.
    held, got = (
        sorted((x.shape, x.tobytes()) for x in jax.tree.leaves(state))
        for state in (before['opt_state'], restored[0].opt_state)
    )
    assert got == held
    trained(tmp_path, task_config())
    assert restored[3] == {1}
    assert_same_curve(tmp_path, whole_run)
    environments = json.loads((tmp_path / 'config.json').read_text())
    assert environments['environment']['carried_out']['mesh'] == dict(data=2, fsdp=2, tensor=2)
    assert environments['resumed_in'][0]['carried_out']['mesh'] == dict(data=1, fsdp=2, tensor=2)


def test_an_interrupted_save_leaves_the_last_one(whole_run, tmp_path):
    """What a kill leaves of a save does not count, and is not in the way of the next."""
    trained(tmp_path, task_config(), stop_after=3)
    torn = [tmp_path / 'checkpoints' / f'{step}.orbax-checkpoint-tmp' for step in (3, 4)]
    for folder in torn:
        (folder / 'carry').mkdir(parents=True)
        (folder / 'carry' / 'manifest.ocdbt').write_text('torn')
    trained(tmp_path, task_config())
    assert without_clock(lines(tmp_path)) == without_clock(lines(whole_run))
    assert not any(folder.exists() for folder in torn)


def test_sigterm_saves_and_exits(whole_run, tmp_path, monkeypatch):
    """In the middle of a segment that no checkpoint ends: nothing of it is lost."""
    real = stand_in.make_task

    def make_task(config, data_dir):
        task = real(config, data_dir)

        def batches(step):
            for number, batch in enumerate(task.stream.batches(step), step):
                if number == 4:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        stream = task.stream.__class__(64, 4, task.stream.shapes, batches)
        return task.__class__(**{**vars(task), 'stream': stream})

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(stand_in, 'make_task', make_task)
        with pytest.raises(SystemExit) as ended:
            trained(tmp_path, task_config())
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    assert [row['step'] for row in lines(tmp_path)] == [1, 2, 3, 4, 5]
    assert [file.name for file in (tmp_path / 'checkpoints').glob('[0-9]*')] == ['5']
    trained(tmp_path, task_config())
    assert without_clock(lines(tmp_path)) == without_clock(lines(whole_run))


@pytest.mark.parametrize(
    'name', ['autoencoder', pytest.param('pos_tagging', marks=pytest.mark.slow)]
)
def test_plain_data_parallelism_of_the_other_tasks(name, tmp_path):
    """A scan over examples on the device, and a stream, without logical axes."""
    config = small_task(name, batch_size=128, epochs=1)
    one = train.train_and_evaluate(
        config, config_of('optimizers', 'adamw'), tmp_path / 'one', progress=False
    )
    with config.unlocked():
        config.mesh = dict(data=-1, fsdp=1, tensor=1)
    eight = train.train_and_evaluate(
        config, config_of('optimizers', 'adamw'), tmp_path / 'eight', progress=False
    )
    for key in one:
        if isinstance(one[key], float) and 'second' not in key:
            assert eight[key] == pytest.approx(one[key], rel=1e-4), key


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            dict(checkpoint_every_epochs=1),
            r'one of checkpoint_every_epochs and checkpoint_every_s',
        ),
        (dict(checkpoint_every_steps=None), r'one of checkpoint_every_epochs and .*, got \[\]'),
        (dict(evaluate_every_epochs=1), r'must have one of evaluate_every_epochs and evaluate_ev'),
        (dict(evaluate_every_steps=None), 'must have one of evaluate_every_epochs and evaluate_'),
        (dict(checkpoint_every_steps=0), 'task.checkpoint_every_steps must be an integer >= 1'),
        (dict(accumulation=0), 'task.accumulation must be an integer >= 1, got 0'),
        (dict(max_to_keep=0), 'task.max_to_keep must be an integer >= 1, got 0'),
        (dict(accumulation=3), r'task.batch_size must be a multiple of .*accumulation = 3'),
        (dict(mesh=(4, 2, 1), accumulation=4), r'= 8 and of .* product 32 '),
        (dict(mesh=(3, 1, 1)), 'their product must be 8, the number of dev'),
    ],
)
def test_wrong_configs(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trained(tmp_path / 'run', task_config(**changes))
    assert not (tmp_path / 'run').exists()


def test_a_stream_must_make_up_the_batch(monkeypatch):
    task = tasks.make(task_config(), None)
    short = {'tokens': jax.ShapeDtypeStruct((5, 5), np.int32)}
    stream = task.stream.__class__(64, 4, (short,), task.stream.batches)
    with pytest.raises(ValueError, match='the stream has 5 examples for each of the 1'):
        segments.check(task.__class__(**{**vars(task), 'stream': stream}), None, 1)


def test_runs_in_one_program_have_no_mesh():
    config = task_config((8, 1, 1))
    with pytest.raises(ValueError, match='several runs in one program have one device'):
        program_lib.together(tasks.make(config, None), config, [optimizer_config('adamw')] * 2)

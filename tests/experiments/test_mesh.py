"""Meshes by their configs, what lies along their axes, and which process reads what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from experiments import mesh as mesh_lib
from experiments import tpu_compile


def config(*sizes):
    return dict(zip(mesh_lib.AXES, sizes, strict=True))


def test_one_size_may_be_left_open():
    for given, expected in (((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 2, 4),) * 2):
        mesh = mesh_lib.make(config(*given))
        assert tuple(mesh.shape[name] for name in mesh_lib.AXES) == expected
        assert mesh.axis_types == (jax.sharding.AxisType.Auto,) * 3


@pytest.mark.parametrize(
    'sizes',
    [
        config(3, 1, 1),
        config(-1, -1, 1),
        config(-1, 3, 1),
        config(0, 1, 8),
        config(True, 1, 8),
        config(2.0, 2, 2),
        {'data': 8, 'fsdp': 1, 'model': 1},
        {'data': 8},
    ],
)
def test_sizes_that_are_no_mesh(sizes):
    with pytest.raises(ValueError, match=r'task.mesh must give integers >= 1, or -1 once'):
        mesh_lib.make(sizes)


def test_a_run_has_a_mesh_if_its_config_says_so(monkeypatch):
    assert mesh_lib.of({}) is None
    assert mesh_lib.of({'mesh': None}) is None
    assert mesh_lib.of({'mesh': config(2, 2, 2)}).shape['fsdp'] == 2
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    assert tuple(mesh_lib.of({}).shape.values()) == (8, 1, 1)


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ('topology', 'sizes'),
    [('v5p:4x4x4', (1, 32, 2)), ('v5p:4x4x4', (2, 8, 4)), ('v6e:4x4', (1, 8, 2))],
)
def test_meshes_that_divide_an_axis_of_the_torus(topology, sizes):
    pytest.importorskip('libtpu')
    devices = tpu_compile.pod_devices(topology).ravel().tolist()
    mesh = mesh_lib.make(config(*sizes), devices)
    assert mesh.devices.shape == sizes
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,) * 3
    assert {device.id for device in mesh.devices.ravel()} == {device.id for device in devices}


def test_rules():
    assert mesh_lib.spec(('batch', 'length', None)) == P(('data', 'fsdp'), None, None)
    with pytest.raises(ValueError, match=r"no rule for the axes \['width'\]"):
        mesh_lib.spec(('embed', 'width'))


SHAPES = {
    'kernel': jax.ShapeDtypeStruct((8, 16), jnp.float32),
    'heads': jax.ShapeDtypeStruct((3, 8), jnp.float32),
    'free': jax.ShapeDtypeStruct((5,), jnp.float32),
}
NAMES = {'kernel': ('embed', 'mlp'), 'heads': ('heads', 'embed'), 'free': None}


def test_parameters_are_divided_where_they_can_be():
    mesh = mesh_lib.make(config(2, 2, 2))
    places = mesh_lib.shardings(mesh, SHAPES, NAMES)
    assert {k: tuple(place.spec) for k, place in places.items()} == {
        'kernel': ('fsdp', 'tensor'),
        'heads': (None, 'fsdp'),
        'free': (),
    }
    assert mesh_lib.left_whole(mesh, SHAPES, NAMES) == ["heads: 'heads', 3 entries, on 'tensor'"]
    plain = mesh_lib.shardings(mesh, SHAPES)
    assert all(place.is_fully_replicated for place in plain.values())
    assert mesh_lib.left_whole(mesh, SHAPES, None) == []


def test_names_that_do_not_fit_are_told_with_the_path():
    mesh = mesh_lib.make(config(2, 2, 2))
    tree = {'layer': {'kernel': SHAPES['kernel']}}
    for names, message in ((('embed',), 'names 1 axes'), (('embed', 'width'), 'no rule')):
        with pytest.raises(ValueError, match=f'logical_axes of layer/kernel: .*{message}'):
            mesh_lib.shardings(mesh, tree, {'layer': {'kernel': names}})


def test_constraints_act_in_a_mesh_alone():
    x = jnp.arange(24.0).reshape(8, 3)
    constrained = jax.jit(lambda x: mesh_lib.constrain(x, ('batch', 'heads')))
    assert constrained(x).sharding == x.sharding
    with jax.set_mesh(mesh_lib.make(config(2, 2, 2))):
        y = jax.jit(lambda x: mesh_lib.constrain(x, ('batch', 'heads')))(x)
        assert y.sharding.shard_shape(y.shape) == (2, 3)  # two devices do not divide 3
        np.testing.assert_array_equal(y, x)


class FakeMesh:
    """Eight devices of some processes; a batch's rows lie on them in turn."""

    def __init__(self, monkeypatch, processes, sizes, own=0):
        self.shape = config(*sizes)
        places = {}
        for i in range(8):
            row = i // sizes[2]
            device = type('Device', (), {'process_index': processes[i]})()
            places[device] = (slice(row, row + 1),)
        place = type('Place', (), {'devices_indices_map': lambda self, shape: places})()
        monkeypatch.setattr(mesh_lib, 'batch', lambda mesh: place)
        monkeypatch.setattr(jax, 'process_index', lambda: own)
        monkeypatch.setattr(jax, 'process_count', lambda: len(set(processes)))


@pytest.mark.parametrize(
    ('processes', 'sizes', 'own', 'part'),
    [
        ((0, 0, 0, 0, 1, 1, 1, 1), (2, 2, 2), 1, (1, 2)),
        ((0, 0, 0, 0, 1, 1, 1, 1), (1, 1, 8), 1, (0, 1)),
        ((0, 0, 1, 1, 2, 2, 3, 3), (1, 2, 4), 2, (1, 2)),  # two processes read one row
        ((1, 1, 1, 1, 0, 0, 0, 0), (8, 1, 1), 0, (1, 2)),  # whoever has the later rows
    ],
)
def test_which_part_a_process_reads(monkeypatch, processes, sizes, own, part):
    assert mesh_lib.part(FakeMesh(monkeypatch, processes, sizes, own)) == part


def test_rows_across_processes_are_refused(monkeypatch):
    mesh = FakeMesh(monkeypatch, (0, 0, 0, 1, 1, 1, 2, 2), (2, 2, 2))
    with pytest.raises(ValueError, match='cuts the batch across the processes'):
        mesh_lib.part(mesh)

"""The whole train step as the compiler sees it: on CPU devices, and with the TPU compiler."""

import dataclasses

import pytest

from experiments import mesh as mesh_lib
from experiments import optimizers, tpu_compile, tpu_train_step
from tests.experiments import stand_in
from tests.experiments.small import config_of


def measured(mesh, name='adamw', layers=stand_in.LAYERS):
    config = stand_in.get_config()
    task = stand_in.make_task(config, None)
    chosen = optimizers.without_search_space(config_of('optimizers', name))
    return tpu_train_step.measure(config, chosen, task, mesh, layers)


def entries(fsdp, tensor):
    """Of the parameters on one device."""
    width, hidden = stand_in.WIDTH // fsdp, stand_in.HIDDEN // tensor
    embed = stand_in.VOCAB // tensor * width
    return embed + 2 * stand_in.LAYERS * width * hidden + stand_in.WIDTH + 3 * width


def check(facts, fsdp, tensor, rows):
    """Three trees like the parameters, the counts, and the batch; all but the latter donated."""
    tokens = 16 // rows * (stand_in.LENGTH + 1) * 4
    carry = 3 * 4 * entries(fsdp, tensor)
    assert carry + tokens <= facts.arguments <= 1.2 * (carry + tokens) + 100_000
    assert facts.donated >= carry
    assert facts.output - facts.donated < 100_000
    assert facts.temporary > 0


def test_a_step_on_cpu_devices_and_its_table():
    mesh = mesh_lib.make(dict(data=2, fsdp=2, tensor=2))
    facts = measured(mesh)
    check(facts, 2, 2, 4)
    assert facts.arguments < 3 * 4 * entries(2, 2) + 500, 'nothing is whole that should not be'
    tokens = 16 * (stand_in.LENGTH + 1)
    assert facts.share == pytest.approx(4 * (3 * entries(1, 1) / 4 + tokens / 4), abs=100)
    # Forward and backward multiply each row by each kernel three times.
    one_layer = 3 * 2 * 2 * 4 * stand_in.LENGTH * stand_in.WIDTH * stand_in.HIDDEN // 2
    once = measured(mesh, layers=None)
    assert facts.flops - once.flops >= 0.9 * (stand_in.LAYERS - 1) * one_layer
    assert sum(facts.collectives.values()) > sum(once.collectives.values())
    shown = tpu_train_step.table({('eight CPUs', 'adamw'): facts})
    assert '| eight CPUs ' in shown
    assert 'all-reduce, MB' in shown


def test_optimizers_are_config_files_with_changes():
    assert tpu_train_step._chosen('configs/optimizers/sonew.py:band=4,eps=1e-3')['band'] == 4
    for wrong in ('configs/optimizers/son.py', 'configs/optimizers/sonew.py:bend=4'):
        with pytest.raises(ValueError, match='--with=configs'):
            tpu_train_step._chosen(wrong)


def test_what_is_saved_is_not_compiled_again(tmp_path):
    facts = tpu_train_step.Facts(1, 1, 2, 3, 0, 4.0, 5.0, {'all-reduce': 6.0}, 7.0)
    results = {
        ('v5e:2x2', 'adamw.py'): facts,
        ('v5e:2x2', 'sonew.py'): dataclasses.replace(facts, traffic=6.0),
    }
    about = {'libtpu': '1', 'task': {'hidden': (8, 3)}}
    tpu_train_step._save(str(tmp_path), about, results)
    assert tpu_train_step._read(str(tmp_path), about) == results
    assert tpu_train_step._read(str(tmp_path / 'other'), about) == {}
    with pytest.raises(ValueError, match='another task or libtpu'):
        tpu_train_step._read(str(tmp_path), about | {'libtpu': '2'})
    rows = (tmp_path / 'tpu_train_step.md').read_text().splitlines()[4:]
    ratios = [[cell.strip() for cell in row.split('|')][8:11:2] for row in rows]
    assert ratios == [['1.000', '1.000'], ['1.000', '1.200']]


@pytest.mark.tpu_compile
@pytest.mark.parametrize(('topology', 'sizes'), [('v5e:4x4', (1, 4, 4)), ('v5p:2x2x2', (2, 2, 2))])
def test_a_step_by_the_tpu_compiler(topology, sizes):
    pytest.importorskip('libtpu')
    devices = tpu_compile.pod_devices(topology).ravel().tolist()
    mesh = mesh_lib.make(dict(zip(mesh_lib.AXES, sizes, strict=True)), devices)
    for name in ('adamw', 'sonew'):
        facts = measured(mesh, name)
        if name == 'adamw':
            check(facts, sizes[1], sizes[2], sizes[0] * sizes[1])
        # All layers are counted: each multiplies each row by two kernels three times.
        once = measured(mesh, name, layers=None)
        one_layer = 3 * 2 * 2 * 16 * stand_in.LENGTH * stand_in.WIDTH * stand_in.HIDDEN / mesh.size
        assert facts.flops - once.flops >= 0.9 * (stand_in.LAYERS - 1) * one_layer
        assert facts.traffic > facts.arguments
        print(topology, sizes, name, dataclasses.asdict(facts))

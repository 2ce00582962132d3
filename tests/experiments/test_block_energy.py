"""The energies by Gram matrices against the same of dense second moments."""

import jax
import numpy as np
import pytest

from experiments import block_energy, gradients, tasks
from tests.experiments.small import small_task

STEPS, INPUTS, OUTPUTS = 6, 5, 4


@pytest.fixture
def grads(rng):
    """Of scales that differ from output to output and from input to input."""
    scales = rng.lognormal(size=(INPUTS, 1)) * rng.lognormal(size=OUTPUTS)
    return (rng.normal(size=(STEPS, INPUTS, OUTPUTS)) * scales).astype(np.float32)


def dense(grads):
    """H (outputs, outputs, inputs, inputs) by blocks."""
    wide = grads.astype(np.float64)
    return np.einsum('tai,tbj->ijab', wide, wide)


def test_gram_matrices_have_the_blocks_inner_products(grads):
    grams = block_energy.gram_matrices(grads)
    energies = np.einsum('its,jts->ij', grams, grams)
    np.testing.assert_allclose(energies, np.sum(dense(grads) ** 2, axis=(-2, -1)), rtol=1e-9)


@pytest.mark.parametrize('side', ['output', 'input'])
def test_block_shares(grads, side):
    if side == 'input':
        grads = np.swapaxes(grads, 1, 2)
    squares = np.sum(dense(grads) ** 2, axis=(-2, -1))
    norms = np.sqrt(np.diag(squares))
    shares = block_energy.block_shares(block_energy.gram_matrices(grads))
    assert shares['even'] == 1 / grads.shape[-1]
    np.testing.assert_allclose(shares['share'], np.trace(squares) / squares.sum(), rtol=1e-9)
    np.testing.assert_allclose(shares['least'], np.sum(norms**2) / np.sum(norms) ** 2, rtol=1e-9)
    assert shares['even'] <= shares['least'] <= shares['share'] <= 1
    own = sum(np.sum(dense(g[None]) ** 2, axis=(-2, -1)) for g in grads)
    across = np.trace(squares - own) / np.sum(squares - own)
    np.testing.assert_allclose(shares['across'], across, rtol=1e-9)


def test_bases_hold_what_the_dense_blocks_say(grads):
    grams = block_energy.gram_matrices(grads)
    blocks = np.einsum('iiab->iab', dense(grads))
    ranks = (1, 3, INPUTS)
    separate = block_energy.held_by_separate(grams, ranks)
    values, vectors = np.linalg.eigh(np.einsum('iab,ibc->ac', blocks, blocks))
    for rank, best in zip(ranks, separate, strict=True):
        hindsight = block_energy.hindsight_basis(grads, grams, rank)
        exact = vectors[:, -rank:]
        np.testing.assert_allclose(hindsight.T @ hindsight, exact @ exact.T, atol=1e-6)
        online = block_energy.online_basis(grads, rank)
        left = []  # of the blocks' left sides, which the hindsight's basis holds best
        for basis in (hindsight, online):
            inside = basis @ blocks @ basis.T
            found = block_energy.held_by(basis, grads, grams)
            trace = np.einsum('ikk->', inside) / np.einsum('iaa->', blocks)
            squares = np.sum(inside**2) / np.sum(blocks**2)
            np.testing.assert_allclose(found['trace'], trace, rtol=1e-6)
            np.testing.assert_allclose(found['squares'], squares, rtol=1e-6)
            assert found['trace'] <= best['trace'] + 1e-5
            assert found['squares'] <= best['squares'] + 1e-5
            left.append(np.sum((basis @ blocks) ** 2))
            if rank == INPUTS:
                np.testing.assert_allclose([*found.values(), *best.values()], 1, rtol=1e-5)
        np.testing.assert_allclose(left[0], values[-rank:].sum(), rtol=1e-6)
        assert left[0] >= left[1] * (1 - 1e-5)


def test_separate_bases_by_dense_eigenvalues(grads):
    values = np.linalg.eigvalsh(np.einsum('iiab->iab', dense(grads)))
    (found,) = block_energy.held_by_separate(block_energy.gram_matrices(grads), [2])
    np.testing.assert_allclose(found['trace'], values[:, -2:].sum() / values.sum())
    np.testing.assert_allclose(found['squares'], (values[:, -2:] ** 2).sum() / (values**2).sum())


def test_from_task_to_tables(tmp_path):
    task = tasks.make(small_task(batch_size=256), None)
    layers, optimizer = ['dense_0', 'dense_3'], {'name': 'sgd', 'learning_rate': 0.0}
    grads, losses = gradients.collect(task, optimizer, layers, warmup=1, steps=3, seed=0)
    assert {k: g.shape for k, g in grads.items()} == {'dense_0': (3, 16, 8), 'dense_3': (3, 8, 16)}
    assert len(losses) == 4
    # At rate 0 each step's is the gradient of all data at the initial parameters.
    params = task.init(jax.random.fold_in(jax.random.key(0), 0))
    exact = jax.grad(task.loss)(params, task.train_data)
    for layer in layers:
        for grad in grads[layer]:
            np.testing.assert_allclose(grad, exact[layer]['kernel'], rtol=1e-3, atol=1e-5)
    found = {'dense_3': block_energy.measure(grads['dense_3'], (1, 8, 16), max_online_rank=1)}
    assert found['dense_3']['ranks'] == [1, 8]
    assert found['dense_3']['held']['online'][-1] is None
    assert 'dense_3, 16 blocks of 8' in block_energy.render(found)
    block_energy.plot(found, tmp_path / 'plot.png')
    assert (tmp_path / 'plot.png').stat().st_size > 1000
    with pytest.raises(ValueError, match='dense_9'):
        gradients.collect(task, optimizer, ['dense_9'], warmup=0, steps=1, seed=0)

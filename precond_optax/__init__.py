"""Second-order and structured preconditioners for JAX, as Optax transformations."""

from precond_optax.applying import update_and_apply
from precond_optax.block_adam import ScaleByBlockAdamState, block_adam, scale_by_block_adam
from precond_optax.grafting import Graft
from precond_optax.layout import Layout, LeafRule
from precond_optax.mbag import ScaleByMbagState, mbag, scale_by_mbag
from precond_optax.plan import LeafPlan, Plan, plan
from precond_optax.shampoo import ScaleByShampooState, scale_by_shampoo, shampoo
from precond_optax.sharding import explicit_sharding, state_sharding
from precond_optax.shared_basis import (
    ScaleBySharedBasisState,
    scale_by_shared_basis,
    shared_basis,
)
from precond_optax.sketchy import ScaleBySketchyState, scale_by_sketchy, sketchy
from precond_optax.soaa import ScaleBySoaaState, scale_by_soaa, soaa
from precond_optax.sonew import ScaleBySonewState, scale_by_sonew, sonew

__version__ = '0.1.0'

__all__ = [
    'Graft',
    'Layout',
    'LeafPlan',
    'LeafRule',
    'Plan',
    'ScaleByBlockAdamState',
    'ScaleByMbagState',
    'ScaleByShampooState',
    'ScaleBySharedBasisState',
    'ScaleBySketchyState',
    'ScaleBySoaaState',
    'ScaleBySonewState',
    'block_adam',
    'explicit_sharding',
    'mbag',
    'plan',
    'scale_by_block_adam',
    'scale_by_mbag',
    'scale_by_shampoo',
    'scale_by_shared_basis',
    'scale_by_sketchy',
    'scale_by_soaa',
    'scale_by_sonew',
    'shampoo',
    'shared_basis',
    'sketchy',
    'soaa',
    'sonew',
    'state_sharding',
    'update_and_apply',
]

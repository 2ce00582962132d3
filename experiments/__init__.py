"""The experiments that reproduce the papers' tables. Not part of the library."""

import os

# Before anything loads OpenBLAS: its threads beside jaxlib's slow small eigenproblems down where
# others need the cores too, and overrun its buffers on a machine with hundreds (jax issue 39292).
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')

# Likewise read once: threads for each simulated device and then some. In jaxlib 0.10 batched
# decompositions wait for each other for ever where as many run at once as there are threads.
_devices = os.environ.get('JAX_NUM_CPU_DEVICES', '')
if _devices.isdigit():
    os.environ.setdefault('PJRT_NPROC', str(max(os.cpu_count() or 1, 4 * int(_devices))))

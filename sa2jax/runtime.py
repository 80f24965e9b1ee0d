"""Run-time choices shared by every program: dtype, compilation cache, buckets."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sa2jax.errors import ShardingError

BUCKETS = 8  # per doubling: at most an eighth of a padded array is padding


def default_dtype() -> jnp.dtype:
    """bfloat16 where the hardware has it; a CPU emulates it, so float32 there."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def uses_scan(mesh: Mesh | None = None) -> bool:
    """Whether layers run in a scan; on one CPU device in a loop, see `nn.unstack`."""
    return jax.default_backend() != "cpu" or (mesh is not None and mesh.size > 1)


def enable_compilation_cache() -> None:
    """Keep compiled programs on disk between runs, unless the user has decided otherwise."""
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(home) / "sa2jax" / "xla"))
        # By default programs that compile within a second are not kept: a start has dozens of them.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def start_distributed() -> int:
    """Join the processes of a multi-host run; to be called before anything is computed.

    On TPU pods, Slurm, Kubernetes and Open MPI everything is found out; elsewhere
    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` say it.

    Returns:
        The number of this process.

    Raises:
        ShardingError: if the others cannot be found.
    """
    count, own = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    try:
        jax.distributed.initialize(
            num_processes=None if count is None else int(count),
            process_id=None if own is None else int(own),
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ShardingError(
            f"the hosts of this run cannot be joined ({reason}): where they cannot find each "
            "other, set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from None
    # What connects hosts waits for the slowest, but not long: let it connect while all are here.
    multihost_utils.sync_global_devices("all hosts are here")
    return jax.process_index()


def round_up(size: int, unit: int = 1) -> int:
    """The smallest bucket that holds `size`: whole units, few of them as sizes grow.

    >>> [round_up(n, 25) for n in (1, 26, 390, 401, 801)]
    [25, 50, 400, 450, 900]
    """
    units = max(-(-size // unit), 1)
    coarse = 1 << max((units - 1).bit_length() - BUCKETS.bit_length(), 0)
    return -(-units // coarse) * coarse * unit

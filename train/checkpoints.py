"""Asynchronous training checkpoints: parameters, optimizer state and position in the data.

Frozen parameters are not written: they are those of the model that the run began with. A checkpoint
gets its name when it is complete; what a killed run left half-written is removed.
"""

import json
import logging
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from sa2jax.atomic_io import disk_errors
from sa2jax.errors import TrainError
from sa2jax.train.optimizer import Optimizer, combine
from sa2jax.train.state import TrainState

STATE, DATA = "state", "data"


class Checkpoints:
    """The checkpoints of a run, by step.

    Args:
        folder: where they are; made if need be.
        keep: newest ones that stay.
        keep_every: those of multiples of this stay, too.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2, keep_every: int | None = None):
        self.folder = Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_every, cleanup_tmp_directories=True
        )
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_is_no_echo)
        self._hooks = sys.unraisablehook, sys.excepthook
        sys.unraisablehook = partial(_report_unraisable, sys.unraisablehook)
        sys.excepthook = partial(_report_uncaught, sys.excepthook)
        with disk_errors(self.folder):
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """The last step of which there is a complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, optimizer: Optimizer, state: TrainState, data: Any) -> None:
        """Write a checkpoint while training goes on; all hosts call it.

        Args:
            step: steps done.
            optimizer: tells what is trained.
            state: the state after them. It may be used up as soon as this returns.
            data: where this host's data is, as JSON can hold it.

        Raises:
            CheckpointError: if an earlier one could not be written.
        """
        saved = _saved_tree(optimizer, state)
        with disk_errors(self.folder):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{
                        STATE: ocp.args.PyTreeSave(saved),
                        DATA: ocp.args.JsonSave({"hosts": _gather_json(data)}),
                    }
                ),
                force=True,
            )

    def restore(
        self, step: int, optimizer: Optimizer, like: TrainState, params: Mapping[str, Any]
    ) -> tuple[TrainState, Any]:
        """Read a checkpoint back.

        Args:
            step: which.
            optimizer: tells what is trained.
            like: shapes and places, see `state.abstract_state`.
            params: those that the run began with, for the frozen ones.

        Returns:
            The state, and where this host's data was.

        Raises:
            TrainError: if it does not fit, or other hosts wrote it.
        """
        wanted = _saved_tree(optimizer, like)
        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = jax.tree.map(
            lambda leaf: (
                leaf
                if leaf.sharding is not None
                else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one)
            ),
            wanted,
        )
        how = ocp.checkpoint_utils.construct_restore_args(wanted)
        try:
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    **{
                        STATE: ocp.args.PyTreeRestore(wanted, restore_args=how),
                        DATA: ocp.args.JsonRestore(),
                    }
                ),
            )
        except (ValueError, KeyError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise TrainError(
                f"the checkpoint of step {step} in {self.folder} cannot be read ({reason}): "
                "remove its folder to go on from the one before"
            ) from None
        hosts = found[DATA]["hosts"]
        if len(hosts) != jax.process_count():
            raise TrainError(
                f"the checkpoint of step {step} was written by {len(hosts)} hosts, each with a "
                f"place in its own data: expected as many, got {jax.process_count()}"
            )
        state = found[STATE]
        _, frozen = optimizer.partition(dict(params))
        whole = TrainState(combine(state["trained"], frozen), state["opt_state"], state["step"])
        return whole, hosts[jax.process_index()]

    def close(self) -> None:
        """Wait until all is written."""
        with disk_errors(self.folder):
            self._manager.wait_until_finished()
            self._manager.close()
        sys.unraisablehook, sys.excepthook = self._hooks

    def abandon(self) -> None:
        """The same after an error: another one says less than that."""
        hooks = sys.unraisablehook, sys.excepthook
        with suppress(Exception):
            self.close()
        # Threads of what was given up may report until Python ends.
        sys.unraisablehook, sys.excepthook = hooks


def _is_no_echo(record: logging.LogRecord) -> bool:
    """Leave out what Orbax's threads say of errors: its next call raises them."""
    if record.name == "asyncio":  # a write whose task was given up, as another had failed
        error = record.exc_info[1] if record.exc_info else None
        return not (isinstance(error, OSError) or "orbax-checkpoint" in str(error))
    return "orbax" not in record.pathname


def _report_unraisable(hook: Callable[[Any], Any], what: Any) -> None:
    """Leave out what writes say that were given up, as one of them had failed."""
    if "Event loop is closed" not in str(what.exc_value):
        hook(what)


def _report_uncaught(hook: Callable[..., Any], kind: Any, error: Any, trace: Any) -> None:
    """The same of what native code prints."""
    if "Event loop is closed" not in str(error):
        hook(kind, error, trace)


def _saved_tree(optimizer: Optimizer, state: TrainState) -> dict[str, Any]:
    trained, _ = optimizer.partition(state.params)
    return {"trained": trained, "opt_state": state.opt_state, "step": state.step}


def _gather_json(data: Any) -> list[Any]:
    """What each host says, in their order."""
    if jax.process_count() == 1:
        return [data]
    text = np.frombuffer(json.dumps(data).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(text.size))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    every = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(every, sizes, strict=True)]

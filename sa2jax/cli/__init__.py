"""`sa2jax <command>`: results on stdout, everything else on stderr.

A user's mistake ends with one line and exit code 2. Each command imports what it needs when it
runs, so that help comes at once.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType

import tyro

from sa2jax.atomic_io import FULL
from sa2jax.cli import common
from sa2jax.cli.bench import bench
from sa2jax.cli.chat import chat, tts
from sa2jax.cli.checkpoints import convert, export, inspect, verify
from sa2jax.cli.data import data
from sa2jax.cli.evaluate import evaluate, suite_command
from sa2jax.cli.init_assemble import assemble, init
from sa2jax.cli.plan import plan
from sa2jax.cli.run import run
from sa2jax.cli.serve import serve
from sa2jax.cli.speech import reconstruct, tokenize, vocode, voice
from sa2jax.cli.train import merge, train
from sa2jax.cli.transcribe import asr, caption, translate
from sa2jax.errors import FileError, Sa2jaxError

COMMANDS: dict[str, Callable[..., None]] = {
    "asr": asr,
    "translate": translate,
    "caption": caption,
    "run": run,
    "chat": chat,
    "tts": tts,
    "vocode": vocode,
    "tokenize": tokenize,
    "reconstruct": reconstruct,
    "voice": voice,
    "convert": convert,
    "export": export,
    "verify": verify,
    "inspect": inspect,
    "serve": serve,
    "bench": bench,
    "plan": plan,
    "data": data,
    "train": train,
    "merge": merge,
    "eval": evaluate,
    "init": init,
    "assemble": assemble,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `sa2jax` command."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        commands = COMMANDS
        if arguments[:1] == ["eval"]:  # its options are those of the suite
            commands = COMMANDS | {"eval": suite_command(arguments[1:])}
        tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="sa2jax",
            description="Step-Audio 2 in JAX: listen, think, speak and convert.",
            args=arguments,
        )
        sys.stdout.flush()
    except Sa2jaxError as error:
        common.log_error(error)
        sys.exit(2)
    except KeyboardInterrupt:
        common.log("interrupted")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, as in `sa2jax ... | head`
        _drop_output()
    except OSError as error:
        if error.errno in FULL:
            _drop_output()
            common.log(f"error: the disk is full: cannot write {error.filename or 'the output'}")
        elif error.filename is None:  # not about a file
            raise
        else:  # a name that is too long, a link to itself, a folder that nobody may enter
            common.log_error(FileError(str(error.filename), error.strerror or str(error.errno)))
        sys.exit(2)


def _drop_output() -> None:
    """Have what was printed go nowhere: writing it at the end would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C. Python drops what is raised in a callback of its garbage collector: try again."""
    inner = frame
    while inner is not None:
        if inner.f_code.co_name == "_xla_gc_callback":
            threading.Timer(0.02, signal.raise_signal, (number,)).start()
            return
        inner = inner.f_back
    raise KeyboardInterrupt

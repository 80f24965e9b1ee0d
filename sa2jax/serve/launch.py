"""Running the application: socket, certificates, signals, shutdown."""

import ipaddress
import logging
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from sa2jax.errors import ConfigError
from sa2jax.serve.settings import MIB
from sa2jax.serve.state import ServerState

log = logging.getLogger(__name__)

MAX_MESSAGE = 24 * MIB  # of a WebSocket: 15 MiB of sound in base64, and JSON around it
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a server listens, and how.

    Attributes:
        host: name or address; by default this machine alone.
        port: 0 for any that is free.
        ssl_certfile: certificate (PEM), for https.
        ssl_keyfile: its key, if it is not in the same file.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def bind(self) -> socket.socket:
        """Take the port; nobody is answered before the server runs.

        Raises:
            ConfigError: if it is taken, or there is no such host.
        """
        try:
            if not 0 <= self.port < 1 << 16:
                raise OverflowError("expected a port of 0 to 65535")
            (family, kind, protocol, _, where), *_ = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            bound = socket.socket(family, kind, protocol)
            try:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                bound.bind(where)
            except OSError:
                bound.close()
                raise
        except (OSError, OverflowError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(
                f"cannot listen on {self.host}:{self.port} ({reason}): choose another --host or "
                "--port"
            ) from None
        return bound

    def require_certificate(self) -> None:
        """Refuse certificates that cannot be used, before a model is loaded.

        Raises:
            ConfigError: if they cannot.
        """
        if self.ssl_certfile is None:
            if self.ssl_keyfile is not None:
                raise ConfigError("--ssl-keyfile without --ssl-certfile: give both")
            return
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"the certificate {self.ssl_certfile} cannot be used ({error}): expected PEM files "
                "for --ssl-certfile and --ssl-keyfile"
            ) from None


def run_server(app: FastAPI, address: Address, bound: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM; then answers under way end, within the grace time.

    Args:
        app: from `create_app`.
        address: where it listens.
        bound: from `address.bind`.
    """
    state: ServerState = app.state.server
    scheme = "http" if address.ssl_certfile is None else "https"
    host, port = bound.getsockname()[:2]
    reach = "this machine only" if address.is_local else "reachable from other machines"
    log.info("%s at %s://%s:%d (%s)", state.settings.model_id, scheme, _in_url(host), port, reach)
    if not address.is_local and not state.keys:
        log.warning("whoever reaches this server may use it: set --api-key-file")
    if not address.is_local and scheme == "http":
        log.warning("keys and recordings travel unencrypted: set --ssl-certfile, or use a proxy")
    config = uvicorn.Config(
        app,
        ssl_certfile=address.ssl_certfile,
        ssl_keyfile=address.ssl_keyfile,
        access_log=False,
        log_config=None,
        server_header=False,
        ws_max_size=MAX_MESSAGE,
        ws_per_message_deflate=False,  # sound in base64 is not worth it
        timeout_graceful_shutdown=max(round(state.settings.grace), 1),
    )
    _Server(config, state).run(sockets=[bound])


class _Server(uvicorn.Server):
    """Ends in order: a signal is a wish, not a failure."""

    def __init__(self, config: uvicorn.Config, state: ServerState):
        super().__init__(config)
        self._state = state

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while it runs, and leave no trace: the command ends well."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Let nobody in any more; at a second signal end at once."""
        admission = self._state.admission
        if not admission.closed:
            log.info(
                "shutting down: %d answers under way, at most %g s; at once with another Ctrl-C",
                admission.running,
                self._state.settings.grace,
            )
        else:  # what is broken off now has nothing to tell
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        admission.close()
        super().handle_exit(sig, frame)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host

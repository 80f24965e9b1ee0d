"""`sa2jax serve`: the server."""

import logging
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from sa2jax.cli import common
from sa2jax.cli.options import Model

_NEEDS = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")
KEY_VARIABLE = "SA2JAX_API_KEY"


def serve(
    options: Model,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    api_key_file: Path | None = None,
    protect_metrics: bool = False,
    allow_origin: tuple[str, ...] = (),
    name: str | None = None,
    rows: int = 8,
    queue: int = 32,
    max_len: int | None = None,
    voices: Path | None = None,
    voice_alias: tuple[str, ...] = (),
    system: str = "You are a helpful assistant.",
    think: bool = False,
    first: int = 10,
    max_upload_mb: int = 2048,
    grace: float = 30.0,
    ssl_certfile: Path | None = None,
    ssl_keyfile: Path | None = None,
    warm_up: bool = True,
    access_log: bool = True,
):
    """Serve a model over OpenAI's protocols, to this machine alone unless told otherwise.

    Chat completions with sound, speech, transcriptions, translations and voices under /v1; /readyz,
    /metrics. Ends in order on Ctrl-C. Needs pip install "sa2jax[serve]"; see docs/serving.md.

    Args:
        options: Model.
        host: Address to listen on; 0.0.0.0 for all of this machine.
        port: Port to listen on, 0 for any.
        api_key: Key that clients send. Who lists this machine's processes can read it here: better
            use a file, or SA2JAX_API_KEY in the environment.
        api_key_file: File of such keys, one a line; lines that begin with # are none.
        protect_metrics: Ask for the key at /health, /readyz, /metrics and /version, too.
        allow_origin: Origin whose pages may use the server from a browser, such as
            https://example.com; * for all.
        name: What clients call the model; by default after its folder.
        rows: Requests that run at the same time.
        queue: Requests that may wait for that; more are sent away.
        max_len: Tokens of a conversation with its answer, by default as many as the model can.
        voices: Folder in which voices are kept that clients add; without it they may add none.
        voice_alias: Another name of a voice, such as alloy=anna.
        system: System prompt of conversations that bring none.
        think: Let a Think model think where a request does not say.
        first: Codes of a stream's first chunk of sound (25 are a second); fewer begin sooner.
        max_upload_mb: Size of an uploaded recording, in MiB.
        grace: Seconds that answers under way may take when the server ends.
        ssl_certfile: Certificate (PEM), for https.
        ssl_keyfile: Key of the certificate.
        warm_up: Make all programs before /readyz says ready; else the first requests wait for them.
        access_log: Write a line of JSON for each request to stderr.
    """
    require_packages()
    from sa2jax.serve.launch import Address, run_server
    from sa2jax.serve.settings import MIB, Settings

    address = Address(host=host, port=port, ssl_certfile=ssl_certfile, ssl_keyfile=ssl_keyfile)
    address.require_certificate()
    settings = Settings(
        model_id=name or ("nano" if options.model is None else options.model.resolve().name),
        api_keys=_keys(api_key, api_key_file),
        public_operations=not protect_metrics,
        allowed_origins=allow_origin,
        local_only=address.is_local,
        rows=rows,
        queue=queue,
        max_len=max_len,
        voices=voices,
        voice_aliases=dict(map(_alias, voice_alias)),
        default_system=system or None,
        think=think,
        first_codes=first,
        max_upload_bytes=max_upload_mb * MIB,
        grace=grace,
    )
    logging.getLogger("sa2jax.serve").setLevel(logging.INFO)
    logging.getLogger("sa2jax.access").setLevel(logging.INFO if access_log else logging.WARNING)
    with address.bind() as bound:
        model = replace(options, batch_size=rows).load()
        from sa2jax.serve.app import create_app

        run_server(create_app(model, settings, warm=warm_up), address, bound)
    common.log("ended")


def require_packages() -> None:
    """Refuse to go on without the packages of the extra `serve`.

    Raises:
        ConfigError: if one is missing.
    """
    from sa2jax.errors import ConfigError

    if any(find_spec(package) is None for package in _NEEDS):
        raise ConfigError('the server needs more packages: pip install "sa2jax[serve]"')


def _keys(key: str | None, file: Path | None) -> tuple[str, ...]:
    """All keys that were given.

    Raises:
        ConfigError: if the file cannot be read, or holds none.
    """
    from sa2jax.errors import ConfigError, FileError
    from sa2jax.files.raw import read_text

    keys = [] if key is None else [key]
    if variable := os.environ.get(KEY_VARIABLE):
        keys.append(variable)
    if file is not None:
        try:
            lines = read_text(file).splitlines()
        except FileError as error:
            raise ConfigError(f"the keys cannot be read: {error}") from None
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise ConfigError(f"{file} holds no key: expected one a line")
        keys += found
    return tuple(keys)


def _alias(text: str) -> tuple[str, str]:
    from sa2jax.errors import ConfigError

    alias, equals, name = text.partition("=")
    if not (equals and alias and name):
        raise ConfigError(f"--voice-alias {text}: expected OTHER=VOICE, such as alloy=anna")
    return alias, name

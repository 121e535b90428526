"""``tinkercloud serve``: prepares what is missing, then runs the server in this process."""

from __future__ import annotations

import errno
import gc
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any

import typer
import uvicorn
from rich.markup import escape

from training.cli.connections import guarded_protocol
from training.cli.models import prepare_model, seed
from training.cli.options import ConfigFile, Models, load_config
from training.cli.output import err
from training.config import DEVELOPMENT_KEY, KEY_PREFIX, ServerConfig, TrainingConfig
from training.core.errors import ConfigError
from training.logs import relay_library_logs
from training.models.registry import resolve_model_path, served_model_info

KEEP_ALIVE_S = 75
"""Longer than clients keep idle connections, so that the server is not the one to close them in
the moment a request is sent."""
SHUTDOWN_S = 30
COLLECT_AFTER = (2_000, 5, 1_000)
"""New objects, collections of these, collections of those: Python's own are (700, 10, 10)."""
SWITCH_S = 0.0005
"""How long a thread that wants to run Python waits for the one that does; Python's own is 5 ms."""


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks one.")
    ] = None,
    config_file: ConfigFile = None,
    model: Models = None,
    prepare: Annotated[
        bool, typer.Option("--prepare/--no-prepare", help="Convert or download missing models.")
    ] = True,
) -> None:
    """Start the server."""
    config = load_config(config_file, host, port, model)
    config.check_exposure()
    with listening_socket(config.server.host, config.server.port) as listener:
        for served in config.served_models():
            directory = prepare_model(served, config) if prepare else None
            if served.backend == "local":
                directory = directory or resolve_model_path(served, config)
            if config.hub.seed_client_cache:
                seed(served.name, directory)
        from training.api import create_app

        app = create_app(config)
        port = listener.getsockname()[1]
        run(
            app,
            listener,
            config.server,
            lambda: banner(config, port),
            lambda: app.state.server.stop_waiting(),
        )


def run(
    app: Callable[..., Any],
    listener: socket.socket,
    limits: ServerConfig,
    on_started: Callable[[], None],
    on_stopping: Callable[[], None],
) -> None:
    """Serves an ASGI application until SIGINT or SIGTERM, then finishes running requests and exits
    with 0. ``on_stopping`` runs before that: whoever waits for long is to be answered."""
    relay_library_logs()
    server = _Server(
        uvicorn.Config(
            app,
            loop="uvloop",
            http=guarded_protocol(limits),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=SHUTDOWN_S,
        ),
        on_started,
        on_stopping,
    )
    # uvicorn raises the signal again after its shutdown; these turn that into a plain exit.
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, _exit)
    server.run(sockets=[listener])
    if not server.started:
        raise typer.Exit(1)


class _Server(uvicorn.Server):
    def __init__(
        self,
        config: uvicorn.Config,
        on_started: Callable[[], None],
        on_stopping: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._on_started = on_started
        self._on_stopping = on_stopping

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            calm_collector()
            sys.setswitchinterval(SWITCH_S)
            self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._on_stopping()
        await super().shutdown(sockets)


def calm_collector() -> None:
    """Full garbage collections look at every object there is, while all requests stand still: 0.2 s
    with 500 clients, every few seconds. So what the start has left is not looked at again (0.1 s),
    and the rest rarely; what a request leaves behind is found by the small ones (10 ms)."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)


def _exit(_signal_number: int, _frame: FrameType | None) -> None:
    sys.exit(0)


def listening_socket(host: str, port: int) -> socket.socket:
    """Bound before anything slow happens, so that a taken port is told at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} is taken: stop the program that uses it, or choose another --port"
            ) from None
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None
    return listener


def banner(config: TrainingConfig, port: int) -> None:
    url = f"http://{_reachable(config.server.host)}:{port}"
    keys = config.auth.secrets()
    models = [served_model_info(model, config) for model in config.served_models()]
    if not config.auth.enabled:
        key, told = f"{KEY_PREFIX}anything", "not checked (authentication is off)"
    elif DEVELOPMENT_KEY in keys:
        key = told = KEY_PREFIX + DEVELOPMENT_KEY
        told += " (for development)"
    else:
        key, told = "...", f"{len(keys)} configured"
    err.print()
    err.print(f"  [bold green]tinkercloud[/] is serving on [bold]{url}[/]")
    err.print(f"  key     {told}")
    for model in models:
        err.print(f"  model   {model.name} [dim]({model.context_length:,} tokens of context)[/]")
    err.print("\n  In the shell of your training script:\n")
    err.print(f"    export TINKER_BASE_URL={url}")
    err.print(f"    export TINKER_API_KEY={key}")
    err.print(f"\n  [dim]Without internet there, also: export HF_ENDPOINT={url}/hf[/]")
    err.print("  [dim]Ctrl-C stops the server.[/]\n")
    _warn_of_unknown_env(config)
    _warn_if_open(config)


def _warn_of_unknown_env(config: TrainingConfig) -> None:
    if (word := config.unknown_env()) is None:
        return
    err.print(f"  [bold red]WARNING: ENV={escape(repr(word[:50]))} is no word of this server's.[/]")
    err.print(f"  [red]It runs for {config.environment}. ENV is production or development.[/]\n")


def _warn_if_open(config: TrainingConfig) -> None:
    if config.server.is_loopback() or (openness := config.auth.openness()) is None:
        return
    err.print(f"  [bold red]WARNING: this server listens to the network, and {openness}.[/]")
    err.print(
        "  [red]Whoever reaches it can use it, and can read and change what is trained on it."
    )
    err.print("  [red]Set TINKER_API_KEY to long random text, or listen with --host 127.0.0.1.[/]")
    err.print("  [dim]With ENV=production the server refuses to start like this.[/]\n")


def _reachable(host: str) -> str:
    """An address to connect to: listening on "all addresses" is not one."""
    if host in ("0.0.0.0", "::", ""):
        return "localhost"
    return f"[{host}]" if ":" in host else host

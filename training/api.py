"""The HTTP application, assembled in one place. ``uvicorn training.api:app`` serves it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
from fastapi import FastAPI

from training import __version__
from training.config import TrainingConfig
from training.logs import configure_logging
from training.models.hub import HubMirror
from training.routers import control, downloads, futures, rest, sampling, training
from training.routers.documentation import complete_openapi, docs_router
from training.routers.errors import install_error_handlers, start_problems
from training.routers.headers import install_headers
from training.routers.hub import hub_router
from training.routers.pacing import PacedApp
from training.services.downloads import open_downloads
from training.services.server import Server

log = structlog.get_logger(__name__)


def create_app(config: TrainingConfig | None = None) -> FastAPI:
    """An application of its own server; ``config`` defaults to the environment's.

    Raises ``ConfigError`` for what production must not start with.
    """
    config = config or TrainingConfig.from_env()
    configure_logging(config.log_format, config.auth.secrets())
    config.check_exposure()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        _warn_about_doors(config)
        with start_problems(app):
            server = Server(config)
            await server.start()
        try:
            with start_problems(app):
                app.state.downloads = await open_downloads(server)
            app.state.server = server
            yield
        finally:
            await server.close()

    app = PacedApp(
        title="tinkercloud",
        version=__version__,
        description="An open server for the Tinker training API.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        separate_input_output_schemas=False,
    )
    install_error_handlers(app)
    install_headers(app, config.server)
    complete_openapi(app)
    for router in (
        control.open_router,
        control.router,
        training.router,
        futures.router,
        sampling.router,
        rest.router,
        downloads.router,
        hub_router(HubMirror(config)),
        docs_router(app),
    ):
        app.include_router(router)
    return app


def _warn_about_doors(config: TrainingConfig) -> None:
    if (word := config.unknown_env()) is not None:
        log.warning(
            "environment.unknown",
            env=word[:50],
            environment=config.environment,
            advice="ENV is production or development; another word counts for nothing",
        )
    if openness := config.auth.openness():
        log.warning(
            "auth.open",
            reason=openness,
            network=not config.server.is_loopback(),
            advice="set TINKER_API_KEY to long random text before others can reach this port",
        )


def __getattr__(name: str) -> FastAPI:
    """``app`` is made when a server asks for it, so that importing this module reads no files."""
    if name == "app":
        return create_app()
    raise AttributeError(name)

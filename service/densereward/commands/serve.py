"""`densereward serve`: the HTTP server. SIGTERM finishes the requests under way and exits with 0."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from densereward.commands import FLAGS
from densereward.server.app import create_app
from densereward.settings import ServerSettings

__all__ = ["Serve", "make_server"]

logger = logging.getLogger("densereward")


class Serve(ServerSettings, cli_prog_name="densereward serve", **FLAGS):
    """Answer trainers over HTTP. Flags win over DENSEREWARD_* in the environment."""

    def cli_cmd(self) -> None:
        """Serve until a signal; exits with 1 if the model cannot be served."""
        logging.basicConfig(level=self.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        server = make_server(self)
        with _listener(self.host, self.port) as listener:
            server.run(sockets=[listener])
        if server.failed:
            sys.exit(1)


def _listener(host: str, port: int) -> socket.socket:
    """The open port; one that is taken is found out before a model is loaded."""
    family, shown = (socket.AF_INET6, f"[{host}]") if ":" in host else (socket.AF_INET, host)
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        sys.exit(f"densereward serve: cannot listen on {shown}:{port}: {error.strerror}")
    logger.info("listening on http://%s:%d", shown, listener.getsockname()[1])
    return listener


class _Server(uvicorn.Server):
    """Uvicorn, which refuses new requests from the first signal on and exits with 0 once it has drained."""

    application: FastAPI

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.application.state.service.drain()
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    @property
    def failed(self) -> bool:
        """Whether the model could not be served."""
        return self.application.state.service.failure is not None


def make_server(settings: ServerSettings) -> _Server:
    """A uvicorn server around the application; `run()` blocks."""
    app = create_app(settings, on_failure=lambda: setattr(server, "should_exit", True))
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_level=settings.log_level,
        timeout_graceful_shutdown=int(settings.drain_timeout) or 1,
    )
    server = _Server(config)
    server.application = app
    return server

"""`densereward demo`: a server on a free port, called through the client, its answer shown as coloured text."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from densereward.commands import FLAGS
from densereward.commands.serve import make_server
from densereward.errors import ModelError
from densereward.settings import ModelSettings, ServerSettings
from densereward_client import Client
from densereward_client.wire import SampleTokenRewards

__all__ = ["Demo"]

_RESPONSES = (
    "Thank you, that was a wonderful evening. The food was great, but the music was awful.",
    "The first half of the film is dull and badly written. The second half is a delight.",
    "I would be glad to help. Mix the flour with warm water, then let the dough rest for an hour.",
    "The room was clean and the staff were friendly, although breakfast was cold and disappointing.",
)
_METHODS: tuple[dict[str, str], ...] = (
    {"name": "red"},
    {"name": "red", "prefix_mode": "closed", "label": "red, closed"},
    {"name": "abc"},
)


class Demo(ModelSettings, cli_prog_name="densereward demo", **FLAGS):
    """Start a server on a free port, call it through the client, and show which tokens earned the reward."""

    def cli_cmd(self) -> None:
        """Run it."""
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        console = Console()
        console.print(f"Starting a server with the model [bold]{self.model}[/bold] ...")
        with _server(self) as url:
            with Client(url, trust_env=False) as client:
                samples = [{"messages": [{"role": "user", "content": ""}], "response": text} for text in _RESPONSES]
                answer = client.token_rewards(samples, methods=list(_METHODS), include=["tokens"])
            console.print(f"POST {url}/token_rewards, {len(samples)} responses, {answer.timing.total_ms:.0f} ms\n")
            for item in answer.data:
                _show(console, item)
        console.print("On green, tokens that earned reward; on red, tokens that lost it; at the right, the extremes.")
        console.print("To keep a server running: densereward serve, or in a clone make serve")


@contextmanager
def _server(model: ModelSettings) -> Iterator[str]:
    """A running server's address; the server stops at the end.

    Raises:
        ModelError: the model cannot be served.
    """
    given = model.model_dump(include=set(ModelSettings.model_fields))
    settings = ServerSettings(**given, api_key=None, log_level="warning")
    server = make_server(settings)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="server")
        thread.start()
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            with Client(url, trust_env=False) as client:
                while not client.ready():
                    if server.failed or not thread.is_alive():
                        raise ModelError("the server did not start; the reason stands above")
                    time.sleep(0.1)
            yield url
        finally:
            server.should_exit = True
            thread.join()


def _show(console: Console, item: SampleTokenRewards) -> None:
    """One line per method, each token on a background that shows its reward."""
    console.print(f"reward [bold]{item.reward:+.2f}[/bold]")
    tokens = item.tokens or []
    for method, rewards in item.token_rewards.items():
        largest = max(abs(rewards).max(), 1e-6)
        line = Text(f"  {method:<12} ")
        for token, reward in zip(tokens, rewards, strict=True):
            line.append(token, style=_style(float(reward / largest)))
        low, high = int(rewards.argmin()), int(rewards.argmax())
        line.append(f"   {tokens[high].strip()} {rewards[high]:+.2f}, {tokens[low].strip()} {rewards[low]:+.2f}")
        console.print(line)
    console.print()


def _style(share: float) -> str:
    """Black on white at 0, towards green at 1 and red at -1."""
    fade = round(255 * (1 - min(1.0, abs(share)) * 0.75))
    ground = (fade, 255, fade) if share >= 0 else (255, fade, fade)
    return f"black on rgb({ground[0]},{ground[1]},{ground[2]})"

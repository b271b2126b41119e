"""`python -m tests.benchmarks.probe URL`: ask again and again, and print the seconds of each answer at the end.

A process of its own, so that nothing but the server can be late. It ends when its input is closed.
"""

from __future__ import annotations

import json
import sys
import threading
import time

import httpx

EVERY = 0.01  # seconds between an answer and the next question


def main() -> None:
    """Probe until the input ends."""
    ended = threading.Event()
    threading.Thread(target=_wait_for_the_end, args=[ended], daemon=True).start()
    seconds = []
    with httpx.Client(timeout=60) as client:
        client.get(sys.argv[1]).raise_for_status()  # connects
        print("ready", flush=True)
        while not ended.wait(EVERY):
            started = time.perf_counter()
            client.get(sys.argv[1]).raise_for_status()
            seconds.append(time.perf_counter() - started)
    print(json.dumps(seconds))


def _wait_for_the_end(ended: threading.Event) -> None:
    sys.stdin.read()
    ended.set()


if __name__ == "__main__":
    main()

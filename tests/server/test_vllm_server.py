"""`densereward serve --engine vllm` as its users have it: the torch engine's answers, and what happens on faults."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

import tiny
from serving import Api, Json, Server, children_named, refusal, serving, until

pytestmark = pytest.mark.vllm

ENGINE = ("--engine", "vllm", "--engine-arguments", '{"kv_cache_memory_bytes": 67108864}', "--max-length", "512")
SAMPLES: list[Json] = [
    {"prompt": "A café in Zürich, ", "response": "thank you, that was wonderful 😀."},
    {"messages": [{"role": "user", "content": "A joke?"}], "response": "Why did the fox jump? The dog was lazy."},
    {"prompt_token_ids": [5, 6, 7], "response_token_ids": [8, 9, 10, 11]},
    {"prompt": "x", "response": ""},
]
METHODS: list[Json] = [{"name": "red"}, {"name": "abc"}, {"name": "abc", "beta": 0.5, "label": "half"}]
LONG: list[Json] = [{"prompt_token_ids": [5] * 97, "response_token_ids": [6 + i % 300] * 400} for i in range(256)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"), "llama", head_dim=32, num_hidden_layers=8)


@pytest.fixture(scope="module")
def on_vllm(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--model", str(folder), "--model-name", "tiny", *ENGINE)
    with serving(tmp_path_factory.mktemp("vllm") / "log", *flags, fresh=True) as running:
        yield running
        print(running.log[-3000:])
        running.terminate()
        assert running.exit_status() == 0


@pytest.fixture(scope="module")
def api(on_vllm: Server) -> Iterator[Api]:
    with httpx.Client(base_url=on_vllm.url, timeout=120, trust_env=False) as http:
        yield Api(http)


def test_red_and_abc_are_those_of_the_torch_engine(api: Api, folder: Path, tmp_path: Path) -> None:
    with (
        serving(tmp_path / "log", "--model", str(folder), "--max-length", "512") as on_torch,
        httpx.Client(base_url=on_torch.url, timeout=60, trust_env=False) as http,
    ):
        expected = Api(http).items(SAMPLES, methods=METHODS)
    for mine, other in zip(api.items(SAMPLES, methods=METHODS), expected, strict=True):
        assert mine["reward"] == pytest.approx(other["reward"], abs=5e-5)
        assert mine["token_rewards"].keys() == other["token_rewards"].keys()
        for method, rewards in other["token_rewards"].items():
            np.testing.assert_allclose(mine["token_rewards"][method], rewards, atol=1e-4)


def test_the_card_names_the_engine_and_what_it_can_serve(api: Api) -> None:
    (card,) = api.http.get("/v1/models").json()["data"]
    assert (card["engine"], card["prefix_modes"]) == ("vllm", ["open"])
    served = {name for name, method in card["methods"].items() if method["available"]}
    assert {"red", "abc", "sparse", "uniform", "occlusion"} <= served
    assert not {"contribution", "attribution", "steps"} & served


@pytest.mark.parametrize("method", [{"name": "red", "prefix_mode": "closed"}, {"name": "contribution"}])
def test_what_it_cannot_give_is_refused_with_the_engine_that_can(api: Api, method: Json) -> None:
    status, error = api.refusal(SAMPLES[:1], methods=[method])
    assert (status, error["code"]) == (422, "method_unavailable")
    assert "--engine torch" in error["message"]


@pytest.mark.parametrize(
    ("sample", "code"),
    [
        ({"prompt_token_ids": [5], "response_token_ids": [320]}, "id_out_of_vocabulary"),
        ({"prompt_token_ids": [5] * 300, "response_token_ids": [6] * 300}, "too_long"),
    ],
)
def test_ids_are_looked_at_before_vllm_gets_them(api: Api, sample: Json, code: str) -> None:
    status, error = api.refusal([sample])
    assert (status, error["code"]) == (422, code)
    assert api.item(SAMPLES[0])["reward"] is not None


def test_vllms_own_metrics_are_scraped_with_the_servers(on_vllm: Server, api: Api) -> None:
    api.items(SAMPLES)
    metrics = on_vllm.metrics()
    assert metrics["densereward_ready"] == 1
    assert any(name.startswith("vllm:prompt_tokens_total") and value > 0 for name, value in metrics.items())


def test_a_caller_who_leaves_takes_the_work_along(on_vllm: Server, api: Api) -> None:
    body = httpx.Request("POST", "http://x/rewards", json={"samples": LONG}).read()
    head = f"POST /rewards HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(on_vllm.address, timeout=10) as connection:
        connection.sendall(head + body)
        until(lambda: on_vllm.metrics()["densereward_queue_tokens"] > 0, "the queue to fill")
    until(lambda: on_vllm.metrics()["densereward_queue_tokens"] == 0, "the queue to empty", 5.0)
    assert on_vllm.metrics()["densereward_dropped_sequences_total"] > 0
    assert api.item(SAMPLES[0])["reward"] is not None


def test_a_process_that_is_killed_turns_the_server_red_and_ends_it(folder: Path, tmp_path: Path) -> None:
    with (
        serving(tmp_path / "log", "--model", str(folder), *ENGINE, fresh=True) as server,
        ThreadPoolExecutor(4) as pool,
    ):
        sent = [
            pool.submit(httpx.post, server.url + "/rewards", json={"samples": LONG}, timeout=120, trust_env=False)
            for _ in range(4)
        ]
        until(lambda: server.metrics()["densereward_queue_tokens"] > 0, "the queue to fill")
        (process,) = children_named("EngineCore", server.process.pid)
        os.kill(process, signal.SIGKILL)
        for each in sent:
            response = each.result()
            status, error = refusal(response)
            assert (status, error["code"]) == (503, "engine_died")
            assert int(response.headers["Retry-After"]) >= 1
        assert server.exit_status() == 1
        assert "the engine's process ended" in server.log


def test_an_unknown_version_ends_the_start_with_a_message(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys, vllm; vllm.__version__ = '0.1.0'; from densereward.cli import main; "
        "sys.argv = ['densereward', 'serve', '--port', '0', '--engine', 'vllm', '--model', sys.argv[1]]; main()"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert "vLLM 0.1.0 is not known here; install 0.32.* or 0.33.*" in ended.stderr

"""From the open port to the last answer, and models that must never become ready."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from densereward.cli import main
from serving import PATIENCE, Json, Server, answer, refusal, until

SMALL: Json = {"prompt_token_ids": [5], "response_token_ids": [6, 7]}
LONG: list[Json] = [{"prompt_token_ids": [5] * 98, "response_token_ids": [6] * 1900}] * 20


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("slow"), num_hidden_layers=8)


@pytest.fixture(scope="module")
def young(slow_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose port has just opened, set up by a file, the environment (an empty key is none) and flags."""
    folder = tmp_path_factory.mktemp("young")
    config = folder / "densereward.toml"
    config.write_text(f'model = "{slow_model}"\nmodel_name = "from the file"\nmax_batch_tokens = 1\n')
    variables = {"DENSEREWARD_CONFIG": str(config), "DENSEREWARD_API_KEY": "", "DENSEREWARD_MAX_BATCH_TOKENS": "3"}
    server = Server(folder / "log", "--max-batch-tokens", "2000", fresh=True, **variables)
    try:
        server.wait_until_listening()
        yield server
        print(server.log[-3000:])
    finally:
        server.stop()


def _post(server: Server, samples: list[Json]) -> httpx.Response:
    return httpx.post(server.url + "/rewards", json={"samples": samples}, timeout=PATIENCE, trust_env=False)


def test_while_the_model_loads_the_server_lives_and_is_not_ready(young: Server) -> None:
    assert young.get("/health").json() == {"status": "alive"}
    ready, models, scored = young.get("/ready"), young.get("/v1/models"), _post(young, [SMALL])
    for response in (ready, models, scored):
        details = {"request_id": response.headers["X-Request-ID"]}
        expected = {"code": "not_ready", "message": "the model is being loaded", "details": details}
        assert refusal(response) == (503, expected)
        assert response.headers["Retry-After"] == "5"
    assert young.metrics()["densereward_ready"] == 0


def test_a_server_that_is_ready_is_what_file_environment_and_flags_made_it(young: Server) -> None:
    young.wait_until_ready()
    assert young.get("/ready").json()["model"] == "from the file"
    before = young.metrics()["densereward_batch_tokens_count"]
    assert answer(_post(young, [SMALL] * 100))["usage"]["forward_tokens"] == 500
    assert young.metrics()["densereward_batch_tokens_count"] == before + 1


def test_sigterm_lets_requests_under_way_finish_and_refuses_others(young: Server) -> None:
    young.wait_until_ready()
    body = json.dumps({"samples": [SMALL]}).encode()
    head = f"POST /rewards HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(young.address, timeout=PATIENCE) as late, ThreadPoolExecutor(1) as pool:
        late.sendall(head + body[:5])
        under_way = pool.submit(_post, young, LONG)
        until(lambda: young.metrics()["densereward_queue_tokens"] > 0, "the work to begin")
        young.terminate()
        until(lambda: "Shutting down" in young.log, "the shutdown to begin")
        late.sendall(body[5:])
        refused = _read_response(late)
        assert not under_way.done()
        with pytest.raises(httpx.ConnectError):
            young.get("/health")
        answered = under_way.result()
    assert refused.startswith("HTTP/1.1 503 ")
    assert re.search(r"^retry-after: 1\r$", refused, re.MULTILINE)
    assert '"code":"draining","message":"the server is shutting down; try another one"' in refused
    assert len(answer(answered)["data"]) == len(LONG)
    assert young.exit_status() == 0


def _read_response(connection: socket.socket) -> str:
    received = b""
    while part := connection.recv(65536):
        received += part
    return received.decode()


def test_sigterm_while_the_model_loads_ends_the_server_before_it_is_ready(slow_model: Path, tmp_path: Path) -> None:
    server = Server(tmp_path / "log", "--model", str(slow_model), fresh=True)
    try:
        server.wait_until_listening()
        until(lambda: server.get("/health").is_success, "the first answer")
        server.terminate()
        assert server.exit_status() == 0
    finally:
        server.stop()
    assert "INFO densereward: ready" not in server.log


def test_a_port_that_is_taken_is_found_out_before_a_model_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SystemExit, match=f"serve: cannot listen on 127.0.0.1:{port}: Address already in use"):
            main(["serve", "--model", str(tmp_path / "none"), "--port", str(port)])
    assert not caplog.records


# --- models that must not be served -------------------------------------------------------------------------------


def _with_weights(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    tiny.save(folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})
    return folder


def test_a_head_that_is_not_a_number_ends_the_process_before_it_is_ready(tmp_path: Path) -> None:
    def spoil(weights: dict[str, Any]) -> None:
        weights["score.weight"][0, 3] = torch.nan

    folder = _with_weights(tmp_path / "model", spoil)
    server = Server(tmp_path / "log", "--model", str(folder))
    assert server.exit_status() == 1
    reason = "the self-check got a score that is not finite; is the dtype too narrow for this model?"
    assert f"ERROR densereward: cannot serve {folder}: {reason}" in server.log
    assert "INFO densereward: ready" not in server.log
    assert "Traceback" not in server.log


def _without_head(folder: Path) -> None:
    _with_weights(folder, lambda weights: weights.pop("score.weight"))


def _with_two_labels(folder: Path) -> None:
    tiny.save(folder, num_labels=2)


def _without_weights(folder: Path) -> None:
    tiny.save(folder)
    (folder / "model.safetensors").unlink()


def _with_torn_weights(folder: Path) -> None:
    tiny.save(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def _with_a_broken_template(folder: Path) -> None:
    tiny.make_model("llama").save_pretrained(folder)
    tiny.make_tokenizer(template="{{ nobody.home() }}").save_pretrained(folder)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (str, "there is no folder {folder}"),
        (lambda folder: folder.mkdir(), "cannot load {folder}: "),
        (_without_head, "{folder}: 1 missing keys while loading (score.weight); such weights would be random and so"),
        (_with_two_labels, "{folder}: num_labels = 2; a reward model that scores sequences has 1"),
        (_without_weights, "cannot load {folder}: "),
        (_with_torn_weights, "cannot load {folder}: "),
        (_with_a_broken_template, "the chat template cannot be used: 'nobody' is undefined"),
    ],
    ids=["no folder", "an empty folder", "no head", "two labels", "no weights", "torn weights", "a broken template"],
)
def test_a_model_that_cannot_be_served_ends_the_server_and_says_why(
    make: Callable[[Path], object], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "model"
    make(folder)
    with pytest.raises(SystemExit) as exit_info:
        main(["serve", "--model", str(folder), "--port", "0"])
    assert exit_info.value.code == 1
    [error] = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert error.startswith(f"cannot serve {folder}: {reason.format(folder=folder)}")

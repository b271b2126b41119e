"""Which error each status becomes, what it carries, and that it can be pickled."""

from __future__ import annotations

import inspect
import math
import pickle
from email.utils import formatdate
from time import time
from typing import TYPE_CHECKING

import pytest

import densereward_client
from densereward_client import (
    BadRequest,
    Client,
    ConnectionFailed,
    DenseRewardError,
    NotFound,
    Overloaded,
    ServerFailure,
    StatusError,
    Unauthorized,
    Unavailable,
    _errors,
)
from densereward_client._errors import status_error

if TYPE_CHECKING:
    from tests.client.conftest import MakeClient, ScriptedServer

SAMPLES = [{"prompt": "p", "response": "a b"}]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, BadRequest),
        (413, BadRequest),
        (422, BadRequest),
        (405, BadRequest),
        (401, Unauthorized),
        (403, Unauthorized),
        (404, NotFound),
        (429, Overloaded),
        (503, Unavailable),
        (500, ServerFailure),
        (502, ServerFailure),
        (504, ServerFailure),
        (307, ServerFailure),
    ],
)
def test_each_status_becomes_its_error_with_code_message_and_details(
    make_client: MakeClient, server: ScriptedServer, status: int, kind: type[StatusError]
) -> None:
    body = {"error": {"code": "some_code", "message": "what to do", "details": {"index": 3}}}
    server.will_reply(body, status=status)
    with pytest.raises(StatusError) as caught:
        make_client(retries=0).token_rewards(SAMPLES)
    error = caught.value
    assert type(error) is kind
    assert (error.status, error.code, error.message, error.details) == (status, "some_code", "what to do", {"index": 3})
    assert str(error) == f"{status} some_code: what to do"


def test_an_answer_that_is_not_ours_is_reported_with_its_status_and_beginning(
    client: Client, server: ScriptedServer
) -> None:
    server.will_reply(b"<html><h1>Bad Gateway</h1>" + b"x" * 5000, status=502)
    with pytest.raises(ServerFailure, match=r"^502 unknown: .*<h1>Bad Gateway</h1>") as caught:
        client.rewards(SAMPLES)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("body", [b"", b"null", b'{"detail": "Not Found"}', b'{"error": "text"}', b"\xff\xfe\x00"])
def test_any_body_at_all_can_be_reported(body: bytes) -> None:
    error = status_error(404, body, None)
    assert isinstance(error, NotFound)
    assert error.code == "unknown"


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(None, None), ("3", 3.0), ("0.25", 0.25), ("-1", 0.0), ("soon", None), ("nan", None), ("inf", None)],
)
def test_retry_after_is_read_as_seconds_and_nonsense_as_absent(header: str | None, seconds: float | None) -> None:
    assert status_error(429, b"", header).retry_after == seconds


def test_retry_after_is_read_as_a_date() -> None:
    ahead = status_error(503, b"", formatdate(time() + 60, usegmt=True)).retry_after
    past = status_error(503, b"", formatdate(time() - 60, usegmt=True)).retry_after
    assert ahead is not None
    assert math.isclose(ahead, 60, abs_tol=2)
    assert past == 0.0


@pytest.mark.parametrize(
    "error",
    [
        ConnectionFailed("no answer"),
        Overloaded(429, "queue_full", "the queue is full", {"tokens": 5}, 2.0),
        BadRequest(422, "too_long", "9 tokens", {}),
    ],
)
def test_an_error_survives_pickling_between_processes(error: DenseRewardError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_every_error_has_one_base_is_exported_and_stands_in_the_tree() -> None:
    errors = [each for _, each in inspect.getmembers(_errors, inspect.isclass) if issubclass(each, Exception)]
    ours = [each for each in errors if each.__module__ == _errors.__name__]
    assert all(issubclass(each, DenseRewardError) for each in ours)
    assert {each.__name__ for each in ours} <= set(densereward_client.__all__)
    assert all(each.__name__ in (_errors.__doc__ or "") for each in ours)

"""From a request's bytes to a request: limits first, then JSON, then each sample by itself.

A parser blocks the event loop until it is done, in any thread, since it holds the interpreter's lock. So a body is cut
into its samples, and these are parsed one by one: between two of them the event loop has its turn. The bodies of other
servers' protocols hold several lists in place of samples; these are parsed entry by entry.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from json import JSONDecoder
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from densereward.errors import ClientGone, DenseRewardError, InvalidRequest, MalformedJSON, TooLarge
from densereward.server.pydantic_errors import errors_in, invalid_request
from densereward_client.wire import RewardsRequest, Sample

__all__ = ["Lists", "body_of", "check_number", "read", "read_lists", "read_whole"]

R = TypeVar("R", bound=RewardsRequest)
B = TypeVar("B", bound=BaseModel)
Samples = list[Sample | DenseRewardError]
Lists = Mapping[str, tuple[str, Callable[[str], Any]]]
"""Of each list: a placeholder in JSON, with which the rest is parsed, and the parser of one entry."""

_JSON = JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")
_PLACEHOLDER = {"samples": '[{"prompt": "", "response": ""}]'}
_NUMBER = "-0123456789"
_SMALL = 2**20
"""Bytes of a body that may be parsed again in one piece, for a better error message."""


async def body_of(request: Request, limit: int) -> bytes:
    """The bytes of a request's body.

    Raises:
        TooLarge: more bytes than the server takes.
        ClientGone: the caller left while sending.
    """
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise TooLarge(f"the body is larger than {limit} bytes; send the samples in parts", limit=limit)
            parts.append(part)
    except ClientDisconnect as error:
        raise ClientGone("the caller left while sending the request") from error
    return b"".join(parts)


def read(body: bytes, kind: type[R], most: int) -> tuple[R, Samples]:
    """Parse a body of at most `most` samples. A sample that cannot be read becomes its error, in its place.

    The request that comes back holds a placeholder for its samples.

    Raises:
        MalformedJSON: not JSON.
        InvalidRequest: JSON that is not such a request, whatever its samples.
        TooLarge: more samples than that.
    """
    try:
        text = body.decode()
        envelope, lists = _cut(text, _PLACEHOLDER)
        if not (places := lists.get("samples")):
            raise ValueError("there are no samples")
        request = kind.model_validate_json(envelope)
        check_number(len(places), most)
        return request, [_sample(text[start:stop]) for start, stop in places]
    except (ValueError, RecursionError):
        request = read_whole(body, kind)
    check_number(len(request.samples), most)
    return request, list(request.samples)


def read_lists(body: bytes, kind: type[B], lists: Lists, most: int) -> B:
    """Parse a body of lists that have one entry for each sample.

    Raises:
        MalformedJSON: not JSON.
        InvalidRequest: JSON that is not such a request.
        TooLarge: more than `most` entries in a list.
    """
    try:
        text = body.decode()
        envelope, places = _cut(
            text, {name: placeholder for name, (placeholder, _) in lists.items()}, most, whole=_NUMBER
        )
        request = kind.model_validate_json(envelope)
        entries = {
            name: [_entry(lists[name][1], text[start:stop], name, index) for index, (start, stop) in enumerate(each)]
            for name, each in places.items()
        }
    except (ValueError, RecursionError) as error:
        if len(body) <= _SMALL:
            return read_whole(body, kind)
        raise _refusal(error) from error
    return request.model_copy(update=entries)


def _refusal(error: ValueError | RecursionError) -> InvalidRequest:
    """The error for a body that could not be parsed in parts."""
    if not isinstance(error, ValidationError):
        return MalformedJSON(f"the body is not JSON: {error}")
    errors = errors_in(error)
    if errors[0]["type"] != "json_invalid":
        return invalid_request(errors)
    message, _, _ = errors[0]["msg"].partition(" at line ")  # of a part, not of the body
    return MalformedJSON(f"the body is not JSON: {message}")


def _entry(read_one: Callable[[str], Any], text: str, name: str, index: int) -> Any:
    """Raises ValidationError where the text is no JSON."""
    try:
        return read_one(text)
    except ValidationError as error:
        errors = errors_in(error)
        if errors[0]["type"] == "json_invalid":
            raise
        for each in errors:
            each["loc"] = (name, index, *each["loc"])
        raise invalid_request(errors) from error


def _cut(
    text: str, placeholders: Mapping[str, str], most: int | None = None, whole: str = ""
) -> tuple[str, dict[str, list[tuple[int, int]]]]:
    """The request with placeholders for its lists, and where the entries of each list begin and end in the text.

    Lists that are empty or begin with a character of `whole` stay where they are.

    Raises:
        ValueError, RecursionError: no JSON object, as far as the standard library can tell.
        TooLarge: a list has more than `most` entries.
    """
    envelope: list[str] = []
    places: dict[str, list[tuple[int, int]]] = {}
    written, at, mark = 0, 0, "{"
    while text[(at := _skip(text, at)) : at + 1] == mark:
        name, at = _JSON.raw_decode(text, _skip(text, at + 1))
        if not isinstance(name, str):
            raise ValueError("a key is no text")
        at = _skip(text, _after(text, _skip(text, at), ":"))
        places.pop(name, None)  # of a repeated key the last counts
        inside = _skip(text, at + 1)
        if name in placeholders and text[at : at + 1] == "[" and text[inside : inside + 1] not in "]" + whole:
            envelope += [text[written:at], placeholders[name]]
            places[name], at = _elements(text, at + 1, name, most)
            written = at
        else:
            _, at = _JSON.raw_decode(text, at)
        mark = ","
    return "".join([*envelope, text[written:]]), places


def _elements(text: str, at: int, name: str, most: int | None) -> tuple[list[tuple[int, int]], int]:
    """Where the elements of a list begin and end, and where the list ends."""
    places: list[tuple[int, int]] = []
    at = _skip(text, at)
    while text[at : at + 1] != "]":
        if places:
            at = _skip(text, _after(text, at, ","))
        if len(places) == most:
            raise TooLarge(
                f"{name} has more than {most} entries, and the server takes so many samples in one request; send them "
                "in parts",
                limit=most,
            )
        _, stop = _JSON.raw_decode(text, at)
        places.append((at, stop))
        at = _skip(text, stop)
    return places, at + 1


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _after(text: str, at: int, mark: str) -> int:
    if text[at : at + 1] != mark:
        raise ValueError(f"no {mark} at {at}")
    return at + 1


def _sample(text: str) -> Sample | DenseRewardError:
    """Raises ValidationError where the text is no JSON."""
    try:
        return Sample.model_validate_json(text)
    except ValidationError as error:
        errors = errors_in(error)
        if errors[0]["type"] == "json_invalid":
            raise
        return invalid_request(errors, sample=_JSON.decode(text))


def read_whole(body: bytes, kind: type[B]) -> B:
    """Parse a body in one piece, so that an error says what is wrong, and where.

    Raises:
        MalformedJSON: not JSON.
        InvalidRequest: JSON that is not such a request.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        errors = errors_in(error)
    if errors[0]["type"] == "json_invalid":
        raise MalformedJSON(f"the body is not JSON: {errors[0]['msg']}")
    of_the_request = [each for each in errors if len(each["loc"]) < 2 or each["loc"][0] != "samples"]
    raise invalid_request(of_the_request or errors)


def check_number(samples: int, most: int) -> None:
    """Refuse more samples than the server takes at once.

    Raises:
        TooLarge: more than `most`.
    """
    if samples > most:
        raise TooLarge(
            f"{samples} samples in one request, and the server takes {most}; send them in parts",
            samples=samples,
            limit=most,
        )

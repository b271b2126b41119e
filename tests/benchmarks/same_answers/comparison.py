"""Two answers to one request, compared byte for byte without what may differ; and what all of them covered."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

HEADERS = ("content-type", "allow", "retry-after", "www-authenticate")
"""The headers that say something about the answer."""

BUSY = 429
"""A status whose answer says when to come back, which is an estimate of the moment."""

_STRING = rb'"(?:[^"\\]|\\.)*"'
_ID = re.compile(rb'("(?:id|request_id)":"[a-z]+-)[0-9a-f]{32}"')
_CREATED = re.compile(rb'("created":)\d+')
_TIMING = re.compile(rb'("(?:queue|forward|total)_ms":)[-+.\deE]+')
_FINGERPRINT = re.compile(rb'("(?:tokenizer_|template_)?fingerprint":)"[^"]*"')
_MESSAGE = re.compile(rb'("code":"\w+","message":)' + _STRING)
_WARNINGS = re.compile(rb'"warnings":\[(?:' + _STRING + rb"|[\[\],])*\]")
_WARNING = re.compile(rb'("\w+: )(?:[^"\\]|\\.)*"')
_PROSE = re.compile(rb'("(?:notice|reason|cost|title|source|equation|sum|use|traps|description)":)' + _STRING)
"""What describes a model or a method; answers with rewards may have methods and labels of these names."""

_CODE = re.compile(rb'"code":"(\w+)","message":')
_REWARDED = re.compile(rb'"(\w+)(?:\.\d+)?":(?:\[[^\]\[{]*\]|"[^"]*")')
_TOKEN_REWARDS = re.compile(rb'"token_rewards":\{([^}]*)\}')
_CONTEXT = 60
"""Bytes shown on each side of the first difference."""


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    content: bytes


@dataclass(frozen=True)
class Parts:
    """An answer's content in parts that are compared each in its own way.

    Attributes:
        rest: all that must be the same, with gaps for what is not.
        fingerprints: of models, tokenizers and templates.
        texts: messages of errors, what follows the code of a warning, descriptions.
    """

    rest: bytes
    fingerprints: list[bytes]
    texts: list[bytes]


@dataclass(frozen=True)
class Comparison:
    """What differs between two answers.

    Attributes:
        difference: the first difference that must not be; None where there is none.
        fingerprints: the fingerprints that differ, old and new.
        texts: the texts that differ, old and new; that is allowed.
    """

    difference: str | None
    fingerprints: list[tuple[str, str]]
    texts: list[tuple[str, str]]


def compare(old: Answer, new: Answer, *, described: bool = False) -> Comparison:
    """Compare two answers; `described` where they describe models or methods."""
    first, second = parts_of(old.content, described=described), parts_of(new.content, described=described)
    return Comparison(
        _difference(old, new, first.rest, second.rest),
        _changed(first.fingerprints, second.fingerprints),
        [] if old.status == BUSY else _changed(first.texts, second.texts),
    )


def parts_of(content: bytes, *, described: bool = False) -> Parts:
    """Take out what may differ, and what is compared by itself."""
    for pattern, gap in ((_ID, rb'\1"'), (_CREATED, rb"\1 0"), (_TIMING, rb"\1 0")):
        content = pattern.sub(gap, content)
    fingerprints: list[bytes] = []
    texts: list[bytes] = []
    content = _without(_FINGERPRINT, content, fingerprints)
    content = _without(_MESSAGE, content, texts)
    content = _WARNINGS.sub(lambda warnings: _without(_WARNING, warnings[0], texts), content)
    if described:
        content = _without(_PROSE, content, texts)
    return Parts(content, fingerprints, texts)


def _without(pattern: re.Pattern[bytes], content: bytes, taken: list[bytes]) -> bytes:
    """The content without what stands behind the pattern's first group."""

    def take(match: re.Match[bytes]) -> bytes:
        taken.append(match[0])
        return bytes(match[1]) + b'"'

    return pattern.sub(take, content)


def _difference(old: Answer, new: Answer, old_rest: bytes, new_rest: bytes) -> str | None:
    if old.status != new.status:
        return f"status {old.status}, then {new.status}: {_shown(old.content)}, then {_shown(new.content)}"
    for name in HEADERS:
        values = old.headers.get(name), new.headers.get(name)
        estimated = name == "retry-after" and old.status == BUSY and None not in values
        if values[0] != values[1] and not estimated:
            return f"header {name} {values[0]!r}, then {values[1]!r}"
    if old_rest == new_rest:
        return None
    same = zip(old_rest, new_rest, strict=False)
    place = next((i for i, (a, b) in enumerate(same) if a != b), min(len(old_rest), len(new_rest)))
    around = slice(max(0, place - _CONTEXT), place + _CONTEXT)
    return f"byte {place}: {_shown(old_rest[around])}, then {_shown(new_rest[around])}"


def _changed(old: list[bytes], new: list[bytes]) -> list[tuple[str, str]]:
    return [(_shown(a), _shown(b)) for a, b in zip(old, new, strict=False) if a != b]


def _shown(content: bytes) -> str:
    return content.decode(errors="replace")[: 4 * _CONTEXT]


@dataclass
class Tally:
    """What was sent, what came back, and what differed.

    Attributes:
        requests: how many of a kind got a status from a server.
        samples: rewarded, by method.
        codes: of errors.
        warnings: by their codes.
        content: bytes compared.
        differences: what must not be, with the request.
        fingerprints, texts: pairs that differ, and how often.
    """

    requests: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    samples: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    warnings: Counter[str] = field(default_factory=Counter)
    content: int = 0
    differences: list[str] = field(default_factory=list)
    fingerprints: Counter[tuple[str, str]] = field(default_factory=Counter)
    texts: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, server: str, kind: str, request: str, answers: tuple[Answer, Answer]) -> None:
        """Compare and count two answers to a request of some kind."""
        old, new = answers
        compared = compare(old, new, described=kind.startswith("/v1/"))
        if compared.difference is not None:
            self.differences.append(f"{server}, {request}: {compared.difference}")
        self.fingerprints.update(compared.fingerprints)
        self.texts.update(compared.texts)
        self.requests[server, kind, old.status] += 1
        self.content += len(old.content)
        self.codes.update(code.decode() for code in _CODE.findall(old.content))
        for warnings in _WARNINGS.findall(old.content):
            self.warnings.update(code[1:-2].decode() for code in _WARNING.findall(warnings))
        for rewards in _TOKEN_REWARDS.findall(old.content):
            self.samples.update(name.decode() for name in _REWARDED.findall(rewards))

    @property
    def same(self) -> bool:
        """Whether nothing differs but texts."""
        return not self.differences and not self.fingerprints

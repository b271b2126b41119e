"""Which methods a request asks for, with which parameters, and whether the engine gives what they need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from densereward.capture import AttentionRow, Need, Objectives, PrefixScores
from densereward.engines.base import Engine
from densereward.errors import InvalidRequest, MethodUnavailable
from densereward.methods import METHODS
from densereward.methods.base import Method, Params, Response
from densereward.methods.describe import describe
from densereward_client.wire import MethodAvailability, MethodRequest, TokenRewardsRequest

__all__ = ["Plan", "availability", "boundaries_of", "default_method", "needs_of", "plan"]

_WITHOUT_PAIR = "it takes a policy and its reference: start the server with --pair policy=SOURCE,reference=SOURCE"

_REENCODED = "To this model each closed prefix is a text of its own: a pass over the prompt and all before its end."

_DEFAULTS = ("red", "steps", "sparse")
"""A request without methods gets the first of these that all its models can serve."""

_OPEN: frozenset[Need] = frozenset([PrefixScores("open")])
_CLOSED: frozenset[Need] = frozenset([PrefixScores("closed")])

_INCLUDED: dict[str, set[Need]] = {
    "prefix_scores": {PrefixScores()},
    "attention": {AttentionRow(-1)},
    "objectives": {PrefixScores(), Objectives()},
}


@dataclass(frozen=True, slots=True)
class Plan:
    """One method of one request.

    Attributes:
        key: of its rewards in the answer: the label, or the name.
        method: redistributes the reward.
        params: its parameters.
    """

    key: str
    method: Method[Any]
    params: Params


def plan(request: TokenRewardsRequest, engine: Engine) -> list[Plan]:
    """Read the methods of a request.

    Raises:
        InvalidRequest: a parameter that does not fit, or one key for two methods.
        MethodUnavailable: no such method.
    """
    default = default_method([availability(engine)])
    plans = [_read(each, engine.facts.layers) for each in request.method_requests(default)]
    keys = [each.key for each in plans]
    if repeated := sorted(key for key, count in Counter(keys).items() if count > 1):
        raise InvalidRequest(
            f"methods: {', '.join(repeated)} asked for twice; give each a `label` of its own",
            code="repeated_method",
            field="methods",
        )
    return plans


def default_method(models: Sequence[Mapping[str, MethodAvailability]]) -> str:
    """The method of a request that names none, for one model or several."""
    return next(name for name in _DEFAULTS if all(methods[name].available for methods in models))


def needs_of(plans: Sequence[Plan], request: TokenRewardsRequest, engine: Engine) -> frozenset[Need]:
    """What the engine must keep of the forward pass for a request.

    Raises:
        MethodUnavailable: the engine cannot keep it; the message names the methods that it can serve, or what is
            missing.
    """
    needs = {need for each in plans for need in each.method.needs(each.params)}
    needs |= {need for name in request.include for need in _INCLUDED.get(name, ())}
    if missing := needs - engine.provides:
        if lacking := [each.key for each in plans if each.method.by_pair and each.method.needs(each.params) & missing]:
            raise MethodUnavailable(f"{', '.join(lacking)}: {_WITHOUT_PAIR}", field="methods")
        elsewhere = f"; {engine.facts.advice}" if engine.facts.advice else ""
        possible = [name for name, method in availability(engine).items() if method.available]
        hint = (
            " (closed ones it gives, to methods with `prefix_mode` = `closed`)"
            if missing == _OPEN and engine.provides >= _CLOSED
            else ""
        )
        raise MethodUnavailable(
            f"this model cannot give {_listed(missing)}{hint}; with default parameters it can serve "
            f"{', '.join(possible)}{elsewhere}",
            field="methods",
            available=possible,
        )
    return frozenset(needs)


def boundaries_of(plans: Sequence[Plan], response: Response) -> list[int] | None:
    """The numbers of response tokens after which a method needs a closed prefix; None is after each token."""
    closing = [each for each in plans if PrefixScores("closed") in each.method.needs(each.params)]
    asked = [each.method.boundaries(response, each.params) for each in closing if response.length]
    if not asked or None in asked:
        return None
    return sorted({boundary for boundaries in asked for boundary in boundaries or ()})


def availability(engine: Engine) -> dict[str, MethodAvailability]:
    """For each method with default parameters: whether the engine can serve it, at what cost, or why not."""
    rows = {}
    for name in METHODS:
        method: Method[Any] = METHODS[name]()
        if missing := method.needs(method.params_type()) - engine.provides:
            reason = _WITHOUT_PAIR if method.by_pair else f"the engine cannot give {_listed(missing)}"
            if engine.facts.advice and not method.by_pair:
                reason += f"; {engine.facts.advice}"
            if missing == _OPEN and engine.provides >= _CLOSED:
                reason = "this model's prefixes are only scored closed: ask with `prefix_mode` = `closed`"
            rows[name] = MethodAvailability(available=False, reason=reason)
        else:
            cost = describe(name).cost
            if engine.facts.reencodes and "prefix_mode" in method.params_type.model_fields:
                cost += f" {_REENCODED}"
            rows[name] = MethodAvailability(available=True, passes=method.passes, cost=cost)
    return rows


def _read(asked: MethodRequest, layers: int) -> Plan:
    if asked.name not in METHODS:
        raise MethodUnavailable(
            f"no method named {asked.name!r}; there are {', '.join(METHODS)}", code="unknown_method", field="methods"
        )
    method: Method[Any] = METHODS[asked.name]()
    try:
        params = method.params_type.model_validate(asked.params)
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise InvalidRequest(f"method {asked.name}: {reasons}", code="invalid_params", field="methods") from error
    _check_layers(asked, params, layers)
    return Plan(asked.key, method, params)


def _check_layers(asked: MethodRequest, params: Params, layers: int) -> None:
    """Refuse a layer that is named twice, as it can be from either end."""
    numbers = getattr(params, "layers", None)
    if isinstance(numbers, list) and len({number % layers for number in numbers}) < len(numbers):
        raise InvalidRequest(
            f"method {asked.name}: layers {numbers} names a layer twice; the model has {layers}, -1 is {layers - 1}",
            code="invalid_params",
            field="methods",
        )


def _listed(needs: set[Need] | frozenset[Need]) -> str:
    return ", ".join(sorted(map(str, needs)))

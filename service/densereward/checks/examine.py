"""The checks before a model is served, and of `densereward check`: would its numbers be wrong?

Each check has a name, by which `--allow` lets a failure pass. A model that cannot be loaded fails under the name of
its error (`ModelError.error_code`), and that cannot be allowed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from densereward.capture import AttentionRow, Captured, Need, PrefixScores, ScoringInput
from densereward.checks.numbers import self_check
from densereward.engines.base import TOLERANCE, Engine
from densereward.errors import EngineFailure, ModelError
from densereward.settings import ALLOWABLE
from densereward.tokenization.align import Aligner

__all__ = ["Finding", "compare_engines", "dtype_drift", "examine", "refuse"]

Status = Literal["ok", "warning", "fail", "allowed"]

_WRITTEN_TOKENS = re.compile(r"<\|[^<>|\s]{1,40}\|>|</?s>|<(?:bos|eos)>|<(?:start|end)_of_turn>")
_QUESTION = [{"role": "user", "content": "question"}]  # each template has rendered it once, when it was loaded

_LEAST_KNOWN = 0.9
"""Share of the model's rows that its tokenizer has tokens for; the rest is padding."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found.

    Attributes:
        name: of the check.
        status: its result.
        text: what was found.
    """

    name: str
    status: Status
    text: str


def examine(engine: Engine, aligner: Aligner, allow: Sequence[str] = ()) -> Iterator[Finding]:
    """Make all checks, one after the other.

    Args:
        engine: loaded.
        aligner: its tokenizer and template.
        allow: names of failures that are let pass.
    """
    for check in _CHECKS:
        for finding in check(engine, aligner):
            allowed = finding.status == "fail" and finding.name in allow
            yield replace(finding, status="allowed") if allowed else finding


def refuse(findings: Iterator[Finding]) -> list[Finding]:
    """All findings, if a model may be served with them.

    Raises:
        ModelError: the first failure.
    """
    seen = []
    for finding in findings:
        if finding.status == "fail":
            hint = f" (--allow {finding.name} serves it nevertheless)" if finding.name in ALLOWABLE else ""
            raise ModelError(finding.text + hint, code=finding.name)
        seen.append(finding)
    return seen


def _weights(engine: Engine, _: Aligner) -> Iterator[Finding]:
    facts = engine.facts
    what = f"{facts.family}, read by the head {facts.head}, {facts.dtype} on {facts.device}"
    yield Finding("weights", "ok", f"all weights are there and none is left over: {what}")
    if facts.notice is not None:
        yield Finding("notice", "warning", facts.notice)


def _vocabulary(engine: Engine, aligner: Aligner) -> Iterator[Finding]:
    known, rows = aligner.vocabulary.size, engine.facts.vocabulary_size
    text = f"the tokenizer has {known} tokens and the model rows for {rows}"
    fits = _LEAST_KNOWN * rows <= known <= rows
    yield Finding("vocabulary", "ok" if fits else "fail", text if fits else f"{text}; it is another model's tokenizer")


def _special_tokens(engine: Engine, aligner: Aligner) -> Iterator[Finding]:
    written = aligner.template.prompt(_QUESTION) if aligner.template else ""
    begins = aligner.adds_bos or aligner.vocabulary.bos_id in aligner.vocabulary.encode(written).ids[:1]
    own = {"bos": aligner.vocabulary.bos_id if begins else None, "eos": aligner.vocabulary.eos_id}
    wrong = [
        f"{name} is {own[name]} for the tokenizer and {sorted(ids)} for the model"
        for name, ids in engine.facts.special_ids.items()
        if ids and own[name] is not None and own[name] not in {*ids, *aligner.closing_ids}
    ]
    if wrong:
        yield Finding("special_tokens", "fail", f"{'; '.join(wrong)}; is it this model's tokenizer?")
    else:
        yield Finding("special_tokens", "ok", "the tokenizer's BOS, where it is used, and EOS are the model's")


def _template(engine: Engine, aligner: Aligner) -> Iterator[Finding]:  # noqa: ARG001  # one signature for all checks
    if aligner.template is None:
        yield Finding("template", "warning", "the model has no chat template: give `prompt`, not `messages`")
        return
    prompt = aligner.template.prompt(_QUESTION)
    split = {text: _split(text, aligner) for text in (aligner.template.closing, prompt)}
    text = "the template writes {}, which the tokenizer does not know as one token each"
    if closing := split[aligner.template.closing]:
        yield Finding("template_tokens", "fail", f"{text.format(closing)}; one of the two is another model's")
    elif split[prompt]:  # as some models do that were trained so
        yield Finding("template_tokens", "warning", text.format(split[prompt]))
    bos = aligner.vocabulary.bos_id
    if bos is not None and aligner.vocabulary.encode(prompt).ids[:2] == [bos, bos]:
        yield Finding("doubled_bos", "fail", "the template begins with two BOS tokens")
    if aligner.template.strips:
        yield Finding("template", "warning", "the template strips white space round an answer; responses keep theirs")
    if not closing:
        yield Finding("template", "ok", f"fingerprint {aligner.template.fingerprint[:12]}")


def _split(text: str, aligner: Aligner) -> str:
    """Special tokens in a text that the tokenizer reads as more than one token."""
    written = dict.fromkeys(_WRITTEN_TOKENS.findall(text))
    return ", ".join(token for token in written if len(aligner.vocabulary.encode(token).ids) != 1)


def _closing(engine: Engine, aligner: Aligner) -> Iterator[Finding]:
    shown = "".join(map(aligner.vocabulary.token_text, aligner.closing_ids))
    if engine.facts.reads_pairs:
        yield Finding("score_position", "ok", f"the score is the whole pair's, closed by {shown!r}")
    elif engine.facts.unit != "sequence":
        yield Finding("score_position", "ok", f"scores are read at each {engine.facts.unit} of a response")
    elif shown:
        yield Finding("score_position", "ok", f"the score is read at the last of the closing tokens {shown!r}")
    else:
        yield Finding("score_position", "warning", "nothing closes a response: the score is read at its last token")


def _numbers(engine: Engine, _: Aligner) -> Iterator[Finding]:
    try:
        self_check(engine)
    except ModelError as error:
        yield Finding("numbers", "fail", error.message)
        return
    yield Finding("numbers", "ok", "finite, and the same alone, in a batch and beside any neighbour")


def _spread(engine: Engine, _: Aligner) -> Iterator[Finding]:
    rewards = np.array([each.reward for each in engine.forward(_sequences(engine))])
    if float(rewards.std()) > 1e-6 * max(1.0, float(np.abs(rewards).max())):
        yield Finding("spread", "ok", f"scores of random sequences lie in [{rewards.min():.3g}, {rewards.max():.3g}]")
    else:
        yield Finding("spread", "fail", f"every text is scored {rewards[0]:.6g}; the head says nothing")


def _parity(engine: Engine, _: Aligner) -> Iterator[Finding]:
    """The same sequences by transformers' own eager attention, one by one."""
    sequences = _sequences(engine)
    kinds: frozenset[Need] = frozenset([PrefixScores("open"), AttentionRow(-1)])
    needs = kinds & engine.provides
    with_needs = [replace(each, needs=needs) for each in sequences]
    try:
        reference = [engine.reference(each) for each in with_needs]
    except EngineFailure as error:
        yield Finding("parity", "warning", f"there is no reference to compare with: {error.message}")
        return
    moved = max(_distance(one, two) for one, two in zip(engine.forward(with_needs), reference, strict=True))
    # An engine may compute scores in another way where no rows are needed.
    plain = engine.forward(sequences)
    scores = [replace(each, prefixes={}, attention_rows={}) for each in reference]
    moved = max(moved, *(_distance(one, two) for one, two in zip(plain, scores, strict=True)))
    limit = TOLERANCE[engine.facts.dtype]
    text = f"scores, prefix scores and attention differ by at most {moved:.1g} from transformers' eager attention"
    yield Finding("parity", "ok" if moved <= limit else "fail", f"{text}; {limit:g} is allowed")


def _distance(one: Captured, two: Captured) -> float:
    """The largest difference of two captures of one sequence, relative to the largest number of each kind."""
    pairs = zip([np.array([one.reward]), *one.arrays], [np.array([two.reward]), *two.arrays], strict=True)
    return max(
        float(np.abs(mine - other).max(initial=0)) / max(1.0, float(np.abs(other).max(initial=0)))
        for mine, other in pairs
    )


def _dtype_drift(engine: Engine, _: Aligner) -> Iterator[Finding]:
    """How far the dtype moves scores, from float32 arithmetic on the same weights."""
    if engine.facts.dtype == "float32":
        yield Finding("dtype_drift", "ok", "computed in float32")
        return
    sequences = _sequences(engine)
    try:
        exact = engine.exactly(sequences)
    except EngineFailure as error:
        yield Finding("dtype_drift", "warning", f"float32 cannot be compared with: {error.message}")
        return
    yield _drift_finding(engine.facts.dtype, engine.forward(sequences), exact, "float32 arithmetic")


def dtype_drift(engine: Engine, exact: Engine) -> Finding:
    """How far the dtype and the rounding of the weights move scores.

    Args:
        engine: as it is to be served.
        exact: the same model in float32.
    """
    sequences = _sequences(engine)
    return _drift_finding(
        engine.facts.dtype, engine.forward(sequences), exact.forward(sequences), "the weights' float32"
    )


def compare_engines(engine: Engine, exact: Engine) -> Finding:
    """How far scores, prefix scores and attention are from another engine's.

    Args:
        engine: as it is to be served.
        exact: the torch engine with the same model in float32.
    """
    kinds: frozenset[Need] = frozenset([PrefixScores("open"), AttentionRow(-1)])
    needs = kinds & engine.provides & exact.provides
    sequences = [replace(each, needs=needs) for each in _sequences(engine)]
    pairs = zip(engine.forward(sequences), exact.forward(sequences), strict=True)
    moved = max(_distance(one, two) for one, two in pairs)
    limit = TOLERANCE[engine.facts.dtype]
    text = f"scores, prefix scores and attention differ by at most {moved:.1g} from the torch engine's in float32"
    return Finding("parity", "ok" if moved <= limit else "fail", f"{text}; {limit:g} is allowed")


def _drift_finding(dtype: str, here: Sequence[Captured], there: Sequence[Captured], what: str) -> Finding:
    """How far scores are from more exact ones."""
    one, two = (np.array([each.reward for each in given]) for given in (here, there))
    moved, largest = float(np.abs(one - two).max()), max(1.0, float(np.abs(two).max()))
    limit = TOLERANCE[dtype]
    status: Status = "ok" if moved <= limit * largest else "fail"
    text = f"{dtype} moves scores of up to {largest:.3g} by {moved:.2g} from {what}"
    return Finding("dtype_drift", status, f"{text}; {limit:g} of the largest is allowed")


def _sequences(engine: Engine) -> list[ScoringInput]:
    """Random sequences of several lengths."""
    generator = np.random.default_rng(2)
    longest = min(48, engine.facts.max_length)
    lengths = [max(length, 4) for length in (longest // 4, longest // 2, longest)]
    ids = [generator.integers(0, engine.facts.vocabulary_size, length).tolist() for length in lengths]
    steps = engine.facts.unit != "sequence"
    return [
        ScoringInput(each, 2, len(each) - 2, len(each) - 1, steps=range(2, len(each)) if steps else ()) for each in ids
    ]


_CHECKS = (_weights, _vocabulary, _special_tokens, _template, _closing, _numbers, _spread, _parity, _dtype_drift)

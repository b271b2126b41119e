"""What the pages in service/docs say is true: their tables, figures, commands and links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from densereward.engines.vllm.model import VERSIONS
from densereward.heads import HEADS
from densereward.methods import METHODS
from densereward_client import Client
from serving import Server, serving

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "service" / "docs"
RESULTS = ROOT / "tests" / "benchmarks" / "results"
REQUIREMENTS = ROOT / "tests" / "trainers" / "requirements"
WRITTEN = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
    for page in (ROOT / "README.md", ROOT / "deploy" / "README.md", *sorted(DOCS.glob("*.md")))
}


def page(name: str) -> str:
    return WRITTEN[f"service/docs/{name}"]


def rows(text: str, header: str) -> dict[str, list[str]]:
    """A table's cells behind the first one, by the first one; the table is the one whose header begins so."""
    table = text[text.index(f"\n| {header}") + 1 :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    return {row[0]: row[1:] for row in cells}


def numbers(text: str) -> list[str]:
    """As they are written, without a multiplication sign or a thousands comma."""
    return re.findall(r"[+-]?\d*\.?\d+", text.replace(",", ""))


def rounds_to(value: float, shown: str) -> bool:
    """Whether a figure is the one that is shown with fewer digits."""
    return abs(value - float(shown)) <= 0.5001 * 10.0 ** -len(shown.partition(".")[2])


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("pages") / "log", "--model", str(tiny_llama)) as running:
        yield running


def test_the_lines_that_bind_a_policys_tokenizer_run(server: Server) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", page("client.md"), re.DOTALL)
    tokenizer = tiny.make_tokenizer()
    ids = [*tokenizer("Thank you").input_ids, tokenizer.eos_token_id]
    with Client(server.url, trust_env=False) as client:
        names: dict[str, Any] = {"client": client, "tokenizer": tokenizer, "ids": ids}
        exec(program, names | {"dialogue": [{"role": "user", "content": "How was it?"}]}, names)
    assert len(names["answer"].data[0].token_rewards["red"]) == len(ids)


def test_the_table_of_methods_is_the_servers(server: Server) -> None:
    found = re.findall(r"^\| `(\w+)` \|.*$", page("methods.md"), re.MULTILINE)
    assert found == list(METHODS) == list(server.get("/v1/models").json()["data"][0]["methods"])


def test_the_parameters_and_defaults_in_the_table_are_the_methods_own() -> None:
    for name in METHODS:
        (row,) = re.findall(rf"^\| `{name}` \|.*$", page("methods.md"), re.MULTILINE)
        fields = METHODS[name].params_type.model_fields
        parameters = row.split("|")[3]
        own = {parameter: field for parameter, field in fields.items() if parameter not in ("normalize", "clip")}
        assert set(re.findall(r"`(\w+)` \(", parameters)) == set(own)
        for parameter, field in own.items():
            shown = re.search(rf"`{parameter}` \(`?([\w.]+)", parameters)
            assert shown is not None
            if field.default is not None:
                assert shown[1] == (
                    f"{field.default:g}" if type(field.default) in (int, float) else _said(field.default)
                )


def _said(default: str | bool) -> str:
    if isinstance(default, str):
        return "texts" if " " in default else default
    return str(default).lower()


def test_the_table_of_families_is_the_codes() -> None:
    found = re.findall(r"^\| (.*) \| `(\w+)` \| (.*) \|$", page("models.md"), re.MULTILINE)
    told = {"sequence": "prefix scores", "token": "a score for each token", "step": "a score for each step"}
    assert [(families, name) for families, name, _ in found[:-1]] == [(HEADS[name].families, name) for name in HEADS]
    assert all(what.startswith(told[HEADS[name].unit]) for _, name, what in found[:-1])


def test_the_trainers_versions_are_those_that_the_tests_run() -> None:
    pins = [line for file in REQUIREMENTS.rglob("*.txt") for line in file.read_text().splitlines()]
    table = re.findall(r"^\| (TRL|OpenRLHF|verl)\b.*?\| (\d+\.\d+\.\d+)", page("trainers.md"), re.MULTILINE)
    assert len(table) == 7
    assert all(f"{trainer.lower()}=={version}" in pins for trainer, version in table)


def test_the_versions_of_vllm_are_the_engines() -> None:
    assert f"vLLM {' and '.join(VERSIONS)} are supported. The tests run {VERSIONS[0]}," in page("engines.md")


def test_the_figures_on_marked_tokens_are_those_of_the_comparison() -> None:
    compared = rows(page("comparison.md"), "method")
    card = rows((ROOT / "service/densereward/default_model/MODEL_CARD.md").read_text(), "method | AUROC, tokens")
    named = {
        "`red`, open prefixes": compared["`red, open`"],
        "`red`, closed prefixes": compared["`red, closed`"],
        "`abc` (beta 1)": compared["`abc`"],
        "`contribution`": compared["`contribution`"],
        "`shapley` over words, 101 passes a text": compared["`shapley`"],
        "a word lexicon (VADER)": card["lexicon"],
        "a constant": card["constant"],
        "random": card["random"],
    }
    shown = rows(page("choosing-a-method.md"), "method | AUROC")
    assert shown.keys() == named.keys()
    for name, cells in shown.items():
        for cell, figure in zip(cells, named[name], strict=False):
            found, expected = numbers(cell), numbers(figure)
            assert [float(each) for each in found] == [float(each) for each in expected][: len(found)]


def test_the_orderings_of_held_out_texts_are_the_model_cards() -> None:
    text = (ROOT / "service/densereward/default_model/MODEL_CARD.md").read_text()
    for name, shown in {
        "movie | 1.0": ".871 (films)",
        "amazon | 1.0": ".848 (products)",
        "nyt | 1.0": ".852 (news)",
        "tweets | 1.0": ".940 (tweets)",
        "davidson": ".975",
        "hh_harmless": ".550",
    }.items():
        (row,) = re.findall(rf"^\| {re.escape(name)} \|.*$", text, re.MULTILINE)
        assert f"0{shown.split()[0]} [" in row
        assert shown in " ".join(page("choosing-a-method.md").split())


def test_the_figures_on_training_are_those_of_the_evidence() -> None:
    evidence = page("evidence.md")
    gains = rows(evidence[evidence.index("Differences to `sparse`") :], "method | mean over training | better in")
    means = rows(evidence, "method | seeds | mean over training")
    steps = rows(evidence, "method | come there")
    endings = rows(evidence, "method | seeds | tokens")
    named = {
        "`sparse`": "sparse",
        "`red` (open; closed is alike)": "red open",
        "`contribution`, rescaled": "contribution",
        "`abc`, beta 0.5": "abc 0.5",
        "`abc`, beta 1": "abc 1",
        "`uniform`": "uniform",
    }
    shown = rows(page("choosing-a-method.md"), "method | mean reward")
    assert shown.keys() == named.keys()
    for name, (gain, speed, divergence, ended) in shown.items():
        row = named[name]
        expected = [gains[row][0].split("(")[0] if row in gains else "", steps[row][1].split("(")[0], means[row][4]]
        for cell, figure in zip((gain, speed, divergence), expected, strict=True):
            assert len(numbers(cell)) == len(numbers(figure))
            assert all(map(rounds_to, map(float, numbers(figure)), numbers(cell)))
        assert [float(each) for each in numbers(ended)] == [float(each) for each in numbers(endings[row][3])]


FIGURES = (
    ["token rewards / sequence only, time"],
    ["token rewards over eager `output_attentions`, padded by 8, speed"],
    [
        "token rewards over eager `output_attentions`, one sequence, T = 2048, speed",
        "token rewards over eager `output_attentions`, 8 padded to T = 2048, speed",
    ],
    ["sequence only over SDPA, padded in one batch, speed"],
    [
        "closed prefixes over one pass per prefix, T = 256, 64-token prompt, padded by 8, speed",
        "closed prefixes over one pass per prefix, T = 256, 512-token prompt, padded by 8, speed",
    ],
    ["8 responses of 64 tokens on one 512-token prompt, over unshared, speed"],
    ["peak memory of a pass, T = 4096, ours", "peak memory of a pass, T = 4096, eager maps"],
    ["served / raw engine, throughput"],
    ["served rewards, calls of 32, over a plain FastAPI server with padded SDPA, throughput"],
    ["served token rewards over vLLM's /pooling token_classify, throughput, 8 responses of 64 to each prompt of 512"],
    ["served token rewards over vLLM's /pooling token_classify, throughput"],
    ["/health while 64 callers wait, p99"],
    ["share of the arithmetic floor, sequence only"],
)
"""What the rows of the table in speed.md are called in the measurements."""


def test_the_figures_on_speed_are_the_measured_ones() -> None:
    measured = (RESULTS / "cpu.md").read_text()
    llama, embedded = (rows("\n" + part, "figure") for part in measured.split("\n## ")[1:])
    shown = rows(page("speed.md"), "figure").values()
    for cells, titles in zip(shown, FIGURES, strict=True):
        assert numbers(cells[0])
        for cell, found in zip(cells, (llama, embedded), strict=True):
            expected = [float(found[title][0].split()[0]) for title in titles if title in found]
            assert len(numbers(cell)) == len(expected)
            assert all(map(rounds_to, expected, numbers(cell)))


def test_the_figures_on_engines_are_the_measured_ones() -> None:
    measured = rows((RESULTS / "engines.md").read_text(), "figure")
    text = page("engines.md")
    for length, cells in rows(text, "tokens in a sequence").items():
        of = f"sequences of {length.replace(',', '')}"
        titles = [f"engine vllm over engine torch, {of}, throughput"]
        titles += [f"engine {name}, {of}, {which} of a call" for which in ("p50", "p99") for name in ("torch", "vllm")]
        found = [number for cell in cells for number in numbers(cell)]
        assert all(map(rounds_to, [float(measured[title][0].split()[0]) for title in titles], found))
        assert len(found) == len(titles)
    memory = re.findall(r"([\d,]+) MB with `(\w+)`", text)
    assert [name for _, name in memory] == ["torch", "vllm"]
    for shown, name in memory:
        value = measured[f"engine {name}, memory of all processes"][0].split()[0]
        assert rounds_to(float(value), shown.replace(",", ""))


@pytest.mark.parametrize("name", list(WRITTEN))
def test_the_commands_that_a_page_names_exist(name: str) -> None:
    code = "\n".join(re.findall(r"```.*?```|`[^`]+`", WRITTEN[name], re.DOTALL))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", code)) <= targets
    commands = set(re.findall(r"(?:^|`|or: )densereward (\w+)", code, re.MULTILINE))
    assert commands <= {"serve", "score", "check", "demo"}


def test_the_help_lists_every_command_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY:((?:.*\\\n)*.*)$", makefile, re.MULTILINE)
    described = re.findall(r"^([a-z-]+):.*## \w", makefile, re.MULTILINE)
    assert (
        set(described)
        == set(phony.replace("\\", "").split())
        == set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    )


@pytest.mark.parametrize("name", list(WRITTEN))
def test_what_a_page_links_to_is_there(name: str) -> None:
    folder = (ROOT / name).parent
    for link, heading in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", WRITTEN[name]):
        target = folder / link if link else ROOT / name
        assert target.exists(), link
        if heading:
            assert heading in map(anchor, re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)), heading


def anchor(heading: str) -> str:
    """A heading's name in a link."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_every_page_is_in_the_index_and_the_readme_leads_there() -> None:
    pages = {name.removeprefix("service/docs/") for name in WRITTEN if name.startswith("service/docs/")}
    index = set(re.findall(r"\]\(([\w-]+\.md)\)", page("README.md")))
    assert index == pages - {"README.md"}
    assert "](service/docs/README.md)" in WRITTEN["README.md"]


def test_no_page_names_the_address_of_a_package_index() -> None:
    files = ["Dockerfile", "Makefile", "deploy/compose.yaml", *WRITTEN]
    for name in files:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert re.findall(r"https?://\S*(?:pypi|pytorch\.org|/simple\b|/whl\b)\S*", text) == []

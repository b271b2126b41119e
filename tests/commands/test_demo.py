"""`densereward demo`: a server, a client and colours, in one command."""

from __future__ import annotations

import re
from pathlib import Path

import tiny
from serving import Run, command


def test_the_demo_shows_every_token_on_a_ground_that_says_what_it_earned(tiny_llama: Path) -> None:
    colours = {"FORCE_COLOR": "1", "COLORTERM": "truecolor", "TERM": "xterm-256color", "COLUMNS": "300"}
    colours["DENSEREWARD_API_KEY"] = "a-key-for-another-server"
    ended = command("demo", "--model", str(tiny_llama), fresh=True, **colours)
    assert ended.returncode == 0, ended.stderr
    assert "WARNING" not in ended.stderr
    assert "not_ready" not in ended.stderr
    plain = re.sub(r"\x1b\[[0-9;]*m", "", ended.stdout)
    assert re.search(r"^POST http://127\.0\.0\.1:\d+/token_rewards, 4 responses, \d+ ms$", plain, re.MULTILINE)
    assert len(re.findall(r"^reward [+-]\d+\.\d\d$", plain, re.MULTILINE)) == 4
    for method in ("red", "red, closed", "abc"):
        number = r"\S* [+-]\d\.\d\d"
        line = rf"^  {method:<12} Thank you, that was a wonderful evening\. .* awful\.   {number}, {number}$"
        assert re.search(line, plain, re.MULTILINE), method
    grounds = re.findall(r"\x1b\[30;48;2;(\d+);(\d+);(\d+)m", ended.stdout)
    assert {ground for ground in grounds if ground[1] == "255" != ground[0]}, "no token earned reward"
    assert {ground for ground in grounds if ground[0] == "255" != ground[1]}, "no token lost reward"
    assert len(set(grounds)) > 20


def test_a_demo_that_cannot_start_says_why(run: Run, tmp_path: Path) -> None:
    ended = run("demo", "--model", tmp_path / "none")
    assert ended.status == 1
    assert ended.err.endswith("densereward demo: the server did not start; the reason stands above\n")


def test_a_demo_of_a_model_without_a_template_says_why(run: Run, tmp_path: Path) -> None:
    tiny.make_model("llama").save_pretrained(tmp_path)
    tiny.make_tokenizer(template=None).save_pretrained(tmp_path)
    ended = run("demo", "--model", tmp_path)
    assert ended.status == 1
    assert ended.err.endswith("this model has no chat template: give `prompt` or `prompt_token_ids`\n")

"""All of the Dockerfile that can be checked without an engine: the lint, its promises, and the commands inside it."""

import json
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
STEPS = [step.strip() for step in re.sub(r"\\\n|^#.*\n", "", TEXT, flags=re.MULTILINE).splitlines() if step.strip()]
FINAL = STEPS[max(index for index, step in enumerate(STEPS) if step.startswith("FROM ")) :]


def the(instruction: str) -> str:
    """Arguments of an instruction that the final stage has exactly once."""
    (step,) = [step for step in FINAL if step.startswith(f"{instruction} ")]
    return step.removeprefix(instruction).strip()


@contextmanager
def server(status: int) -> Iterator[int]:
    """A server on a free port that answers GET /health, and nothing else, with this status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        yield http.server_port
        http.shutdown()


def health_check_exit(port: int) -> int:
    python, *arguments = json.loads(the("HEALTHCHECK").split("CMD ", 1)[1])
    assert python == "python"
    arguments = [argument.replace("8000", str(port)) for argument in arguments]
    return subprocess.run([sys.executable, *arguments], capture_output=True, timeout=20).returncode


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    run = subprocess.run([hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "")


def test_the_default_base_has_cuda_and_a_build_argument_selects_one_without() -> None:
    assert "ARG VARIANT=cuda" in STEPS
    assert "FROM base-${VARIANT} AS base" in STEPS
    bases = dict(re.findall(r"^FROM (\S+:\S+) AS base-(\w+)$", TEXT, flags=re.MULTILINE))
    assert {variant: image.split(":")[0] for image, variant in bases.items()} == {
        "cuda": "nvidia/cuda",
        "cpu": "python",
    }
    assert FINAL[0] == "FROM base"


@pytest.mark.parametrize("image", re.findall(r"^FROM (\S+:\S+)", TEXT, flags=re.MULTILINE))
def test_a_base_is_pinned_to_its_patch_release(image: str) -> None:
    assert re.search(r":\d+\.\d+\.\d+-", image)


@pytest.mark.parametrize("index", ["", "https://index.example/simple"])
def test_torch_comes_from_pips_default_index_unless_a_build_argument_names_another(index: str) -> None:
    assert [step for step in STEPS if "ARG TORCH_INDEX_URL" in step] == ["ARG TORCH_INDEX_URL"]
    (command,) = re.findall(r"PIP_INDEX_URL=\S* pip install [^&]*torch==\S*", TEXT)
    run = subprocess.run(
        ["sh", "-eu", "-c", 'pip() { echo "$@ from $PIP_INDEX_URL"; }\n' + command],
        env={"TORCH_INDEX_URL": index, "TORCH_VERSION": "2.13.0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == f"install torch==2.13.0 from {index}\n"


def test_the_server_does_not_run_as_root() -> None:
    user = the("USER")
    assert user.isdecimal()
    assert int(user) >= 10_000
    assert any(f"useradd --no-log-init --uid {user} " in step for step in FINAL)


def test_the_server_is_started_with_exec_so_that_it_gets_the_stop_signal_itself() -> None:
    assert json.loads(the("ENTRYPOINT")) == ["densereward"]
    assert json.loads(the("CMD")) == ["serve", "--host", "0.0.0.0", "--port", the("EXPOSE")]
    assert the("STOPSIGNAL") == "SIGTERM"


def test_the_requirements_step_prints_what_the_service_extra_needs() -> None:
    (step,) = [step for step in STEPS if "> requirements.txt" in step]
    command = step.removeprefix("RUN ").removesuffix(" > requirements.txt").replace("python3", sys.executable, 1)
    printed = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert printed.split("\n")[:-1] == [*project["dependencies"], *project["optional-dependencies"]["service"]]


def test_the_build_context_holds_what_the_package_is_built_from_and_nothing_else() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    kept = {line.removeprefix("!") for line in lines if line.startswith("!")}
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = build["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    project = build["project"]
    sources = {package.split("/")[0] for package in packages}
    assert kept == {"pyproject.toml", project["readme"], *project["license-files"], *sources}


@pytest.mark.parametrize(("status", "code"), [(200, 0), (404, 1), (500, 1), (503, 1)])
def test_the_health_check_passes_only_on_200(status: int, code: int) -> None:
    with server(status) as port:
        assert health_check_exit(port) == code


def test_the_health_check_fails_when_nobody_listens() -> None:
    with server(200) as port:
        pass
    assert health_check_exit(port) != 0


def test_the_health_check_asks_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with server(200) as port:
        assert health_check_exit(port) == 0

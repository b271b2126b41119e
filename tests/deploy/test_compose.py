"""deploy/compose.yaml against the Compose Specification's schema, and against the Dockerfile whose image it runs."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from densereward.metrics import Metrics
from densereward.settings import ServerSettings

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "deploy" / "compose.yaml"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
FILE: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
SERVICE: dict[str, Any] = FILE["services"]["densereward"]


def schema_check(path: Path) -> subprocess.CompletedProcess[str]:
    """Checks a file against the schema that check-jsonschema carries, so without a network."""
    command = [
        str(Path(sys.executable).with_name("check-jsonschema")),
        "--builtin-schema",
        "vendor.compose-spec",
        str(path),
    ]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_file_fits_the_compose_specification() -> None:
    run = schema_check(COMPOSE)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize(("good", "bad"), [("restart:", "restarts:"), ("count: 1", "count: [1]"), ("[gpu]", "gpu")])
def test_the_check_notices_a_mistake(tmp_path: Path, good: str, bad: str) -> None:
    assert COMPOSE.read_text().count(good) == 1
    broken = tmp_path / "compose.yaml"
    broken.write_text(COMPOSE.read_text().replace(good, bad))
    assert schema_check(broken).returncode == 1


def test_there_is_one_service_built_from_the_dockerfile_and_it_reserves_one_gpu() -> None:
    assert list(FILE["services"]) == ["densereward"]
    assert (COMPOSE.parent / SERVICE["build"] / "Dockerfile").resolve() == ROOT / "Dockerfile"
    devices = SERVICE["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]


def test_the_model_cache_is_a_named_volume_where_the_image_keeps_its_caches() -> None:
    caches = re.findall(r"(?:HF_HOME|XDG_CACHE_HOME)=(/\w+)", DOCKERFILE)
    assert len(caches) == 2
    assert SERVICE["volumes"] == [f"cache:{folder}" for folder in set(caches)]
    assert "cache" in FILE["volumes"]
    assert re.search(r"install --directory --owner=densereward .* /cache$", DOCKERFILE, flags=re.MULTILINE)


def test_the_published_port_is_the_exposed_one_and_the_host_s_comes_from_the_environment() -> None:
    exposed = re.findall(r"^EXPOSE (\d+)$", DOCKERFILE, flags=re.MULTILINE)
    assert SERVICE["ports"] == [f"${{DENSEREWARD_PORT:-{port}}}:{port}" for port in exposed]


def test_it_starts_again_after_a_crash_and_not_after_being_stopped() -> None:
    assert SERVICE["restart"] == "unless-stopped"


def test_the_health_check_is_the_image_s_with_minutes_for_a_first_download() -> None:
    assert "HEALTHCHECK" in DOCKERFILE
    assert SERVICE["healthcheck"] == {"start_period": "30m"}


def test_every_setting_of_the_server_passes_through_to_it() -> None:
    set_here = {"DENSEREWARD_DEVICE=cuda"}  # and the image's own command sets host and port
    settings = {
        f"DENSEREWARD_{name.upper()}" for name in ServerSettings.model_fields.keys() - {"device", "host", "port"}
    }
    assert set(SERVICE["environment"]) == settings | set_here | {"HF_TOKEN"}


def test_a_stop_waits_longer_than_the_server_drains() -> None:
    minutes = int(SERVICE["stop_grace_period"].removesuffix("m"))
    assert minutes * 60 > ServerSettings.model_fields["drain_timeout"].default


def test_the_page_for_operators_names_only_settings_and_metrics_that_exist() -> None:
    page = (ROOT / "deploy" / "README.md").read_text()
    settings = {f"DENSEREWARD_{name.upper()}" for name in ServerSettings.model_fields}
    assert set(re.findall(r"\bDENSEREWARD_[A-Z_]+", page)) <= settings
    metrics = set(re.findall(r"^# TYPE (\w+)", Metrics().render().decode(), flags=re.MULTILINE))
    assert set(re.findall(r"\bdensereward_[a-z_]+", page)) <= metrics


def test_the_page_for_operators_gives_the_defaults_that_hold() -> None:
    page = (ROOT / "deploy" / "README.md").read_text()
    rows = dict(re.findall(r"^\| `DENSEREWARD_([A-Z_]+)` \| `?([^`|]+?)`? \|", page, flags=re.MULTILINE))
    assert len(rows) == 10
    for name, default in rows.items():
        held = ServerSettings.model_fields[name.lower()].default
        shown = held[0] if isinstance(held, list) else held
        assert shown == (None if default == "none" else type(shown)(default))

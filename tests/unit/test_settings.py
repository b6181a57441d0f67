"""Settings of a file, the environment and flags: one schema, later wins, what is wrong is told."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from typer.testing import CliRunner

from gateway.cli import schema as schemas
from gateway.cli.effective import effective
from gateway.cli.main import app
from gateway.cli.reference import markdown
from gateway.cli.schema import Group, schema, settings
from gateway.cli.settings import MASK, Loaded, load
from gateway.cli.sources import SettingsRefused, Tree, from_flags
from gateway.config import GatewayConfig
from workers.config import WorkerConfig

ROOT = Path(__file__).parents[2]
NO_VARIABLES: Mapping[str, str] = {}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "sessile.toml"


def refusals(process: str, **sources: Any) -> tuple[str, ...]:
    with pytest.raises(SettingsRefused) as refused:
        load(process, **{"environment": NO_VARIABLES, **sources})
    return refused.value.problems


def test_without_sources_everything_is_as_the_dataclasses_say() -> None:
    assert load("gateway", environment=NO_VARIABLES).config == GatewayConfig()


def test_the_file_the_environment_flags_and_set_win_in_this_order(file: Path) -> None:
    file.write_text(
        '[gateway]\nlisten = "localhost:1"\ngateway_id = "f"\n[gateway.times]\nsettle_s = 1\n'
    )
    environment = {"SESSILE_GATEWAY__GATEWAY_ID": "e", "SESSILE_GATEWAY__TABLES__SALTS": "7"}
    flags = from_flags(("tables.salts", "--salts", 8), ("gateway_id", "--id", None))
    made = load(
        "gateway",
        file=file,
        environment=environment,
        flags=flags,
        assignments=["times.settle_s=2.5", "gateway.tables.channels=3"],
        generated=from_flags(("gateway_id", "made up", "g"), ("reflection", "made up", False)),
    )
    config: GatewayConfig = made.config
    assert (config.listen, config.gateway_id, config.reflection) == ("localhost:1", "e", False)
    assert (config.tables.salts, config.times.settle_s, config.tables.channels) == (8, 2.5, 3)
    assert made.origins[("gateway", "gateway_id")] == "SESSILE_GATEWAY__GATEWAY_ID"
    assert made.origins[("gateway", "times", "settle_s")] == "--set times.settle_s"
    assert made.origins[("gateway", "listen")] == str(file)


def test_common_settings_are_of_every_process_that_does_not_say_otherwise(file: Path) -> None:
    file.write_text('[common]\nredis_url = "redis://a"\n[worker]\nredis_url = "redis://b"\n')
    common = load("gateway", file=file, environment={"SESSILE_REDIS": ""}).config
    assert common.redis_url == "redis://a"
    own = load("worker", file=file, environment={}, generated=WORKER_NAME).config
    assert own.redis_url == "redis://b"
    alias = {"SESSILE_REDIS": "redis://c"}
    assert load("gateway", file=file, environment=alias).config.redis_url == "redis://c"


WORKER_NAME = from_flags(("replica.replica_id", "made up", "w"))


@pytest.mark.parametrize("process", ["gateway", "worker"])
def test_the_log_level_is_a_setting_with_a_variable_of_its_own(process: str, file: Path) -> None:
    file.write_text(
        '[common.telemetry]\nlog_level = "warning"\n[worker]\nredis_url = "redis://a"\n'
    )

    names = WORKER_NAME if process == "worker" else None
    own = f"SESSILE_{process.upper()}__TELEMETRY__LOG_LEVEL"

    def level(flags: Tree | None = None, **environment: str) -> str:
        given = load(process, file=file, environment=environment, flags=flags, generated=names)
        return str(given.config.telemetry.log_level)

    assert level() == "warning"
    assert level(SESSILE_LOG_LEVEL="ERROR") == "ERROR"
    variables = {"SESSILE_LOG_LEVEL": "ERROR", own: "DEBUG"}
    assert level(None, **variables) == "DEBUG"
    assert level(from_flags(("telemetry.log_level", "--log-level", "info")), **variables) == "info"
    wrong = {"SESSILE_LOG_LEVEL": "LOUD"}
    (problem,) = refusals(process, file=file, environment=wrong, generated=names)
    assert "log_level is from SESSILE_LOG_LEVEL" in problem


def test_engine_options_are_a_table_and_text_to_the_engine(file: Path) -> None:
    file.write_text(
        '[worker]\nredis_url = "redis://a"\n'
        '[worker.engine_options]\nmodel = "m"\nkv_pages = 100\nshare = 0.5\nfast = true\n'
    )
    environment = {"SESSILE_WORKER__ENGINE_OPTIONS__KV_PAGES": "200"}
    config: WorkerConfig = load(
        "worker", file=file, environment=environment, generated=WORKER_NAME
    ).config
    assert dict(config.engine_options) == {
        "model": "m", "kv_pages": "200", "share": "0.5", "fast": "true",
    }  # fmt: skip


def test_the_file_that_the_environment_names_is_read(file: Path) -> None:
    file.write_text('[gateway]\nlisten = "localhost:1"\ndata_directory = "data"\n')
    config = load("gateway", environment={"SESSILE_CONFIG": str(file)}).config
    assert config.listen == "localhost:1"
    assert config.data_directory == file.parent / "data"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[gateway.times]\nfleet_pol_s = 1", "did you mean gateway.times.fleet_poll_s?"),
        ("[gateway]\nfleet_poll_s = 1", "did you mean gateway.times.fleet_poll_s?"),
        ("[gatway]\nlisten = 'a:1'", "[gatway] is not a table of settings; did you mean gateway?"),
        ("listen = 'a:1'", "settings are in tables: gateway, worker, common"),
        ("[common.times]\nsettle_s = 1", "only gateway has it: write it as gateway.times"),
        ("[common]\nredis_ulr = 'x'", "did you mean common.redis_url?"),
        ("[worker]\nkvlisten = 'a:1'", "did you mean worker.kv_listen?"),
        ("[gateway.times]\nsettle_s = '1'", "must be a number (seconds), not '1'"),
        ("[gateway.times]\nsettle_s = nan", "must be a number (seconds) that is finite, not nan"),
        ("[gateway.times]\nsettle_s = -inf", "that is finite, not -inf"),
        ("[gateway.redis]\nwait_s = inf", "that is finite, not inf"),
        ("[gateway.tables]\nsalts = 1.5", "must be a whole number, not 1.5"),
        ("[gateway.store]\nmax_retention_ms = 'x'", "must be a whole number (milliseconds)"),
        ("[gateway]\nreflection = 'yes'", "must be true or false, not 'yes'"),
        ("[gateway]\ntimes = 3", "gateway.times (from "),
        ("[gateway]\ntimes = 3", "must be a group of settings, not 3"),
        ("[gateway.listen]\nhost = 'a'", "must be text, not a group of settings"),
        ("[gateway", "is not TOML"),
    ],
)
def test_a_wrong_file_is_refused_with_the_fix(file: Path, content: str, told: str) -> None:
    file.write_text(content + "\n")
    (problem,) = refusals("gateway", file=file)
    assert told in problem
    assert str(file) in problem


def test_paths_of_flags_are_taken_as_they_are(tmp_path: Path) -> None:
    flags = from_flags(("data_directory", "--data-directory", tmp_path))
    assert load("gateway", environment={}, flags=flags).config.data_directory == tmp_path


def test_a_file_that_is_not_there_is_told(file: Path) -> None:
    (problem,) = refusals("gateway", file=file)
    assert "cannot be read" in problem
    assert str(file) in problem


def test_every_problem_is_told_at_once(file: Path) -> None:
    file.write_text("[gateway]\nlisen = 'a:1'\n[gateway.times]\nsettle_s = 'x'\nstop_turn_s = -1\n")
    environment = {"SESSILE_GATEWAY__TABLES__OWNERS": "many"}
    problems = refusals("gateway", file=file, environment=environment)
    assert len(problems) == 3
    assert "SESSILE_GATEWAY__TABLES__OWNERS" in problems[-1]


def test_contradictions_name_where_both_sides_are_from(file: Path) -> None:
    file.write_text("[gateway.times]\nfleet_poll_s = 0.9\n")
    flags = from_flags(("liveness.outage_after_s", "--outage", 1.5))
    (problem,) = refusals("gateway", file=file, flags=flags)
    assert f"gateway.times.fleet_poll_s is from {file}" in problem
    assert "gateway.liveness.outage_after_s is from --outage" in problem


def test_what_must_be_set_is_told_with_the_ways_to_set_it() -> None:
    (problem,) = refusals("worker", generated=WORKER_NAME)
    assert problem.startswith("worker.redis_url must be set")
    assert "SESSILE_REDIS" in problem


@pytest.mark.parametrize("assignment", ["times.settle_s", "=1", "a..b=1"])
def test_set_takes_a_path_and_a_value(assignment: str) -> None:
    (problem,) = refusals("gateway", assignments=[assignment])
    assert "--set takes PATH=VALUE" in problem


def test_unknown_variables_of_sessile_are_refused_and_others_are_not() -> None:
    (problem,) = refusals("gateway", environment={"SESSILE_GATEWAY__LISEN": "x"})
    assert "did you mean gateway.listen?" in problem
    load("gateway", environment={"SESSILE_GATEWAY": "127.0.0.1:1", "SESSILE_CACHE_DIR": "x"})


# -- what groups that do not exist yet may look like -------------------------------------------


@dataclass(frozen=True, slots=True)
class Quota:
    sessions: int = 10
    token: str = field(default="", metadata={"secret": True})


@dataclass(frozen=True, slots=True)
class Tls:
    """Certificates."""

    certificate: Path
    """PEM."""
    key: Path


@dataclass(frozen=True, slots=True)
class Shape:
    quotas: Mapping[str, Quota] = field(default_factory=dict)
    issuers: tuple[Quota, ...] = ()
    algorithms: tuple[str, ...] = ("RS256",)
    mode: Literal["off", "keys"] = "off"
    password: str = field(default="", metadata={"secret": True})
    limit: int | None = None
    tls: Tls | None = None


@pytest.fixture
def shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(schemas.CONFIGS, "gateway", Shape)
    schema.cache_clear()


@pytest.fixture(autouse=True)
def _fresh_schema() -> Iterator[None]:
    yield
    schema.cache_clear()


@pytest.mark.usefixtures("shape")
def test_groups_may_be_optional_in_tables_and_in_lists(file: Path) -> None:
    file.write_text(
        '[gateway]\nmode = "keys"\nalgorithms = ["A", "B"]\n'
        "[gateway.quotas.acme]\nsessions = 3\n[gateway.tls]\ncertificate = 'c.pem'\nkey = '/k'\n"
        "[[gateway.issuers]]\nsessions = 4\n[[gateway.issuers]]\n"
    )
    environment = {
        "SESSILE_GATEWAY__ALGORITHMS": "X,Y",
        "SESSILE_GATEWAY__LIMIT": "",
        "SESSILE_GATEWAY__QUOTAS__OTHER": "{sessions = 5}",
    }
    config: Shape = load("gateway", file=file, environment=environment).config
    assert config == Shape(
        quotas={"acme": Quota(3), "other": Quota(5)},
        issuers=(Quota(4), Quota()),
        algorithms=("X", "Y"),
        mode="keys",
        tls=Tls(file.parent / "c.pem", Path("/k")),
    )


@pytest.mark.usefixtures("shape")
def test_what_is_wrong_inside_tables_and_lists_is_told(file: Path) -> None:
    file.write_text(
        "[gateway]\nmode = 'on'\n[gateway.quotas.acme]\nsesions = 3\n"
        "[[gateway.issuers]]\nsessions = 'x'\n[gateway.tls]\ncertificate = 'c'\n"
    )
    problems = "\n".join(refusals("gateway", file=file))
    assert "must be off or keys, not 'on'" in problems
    assert "did you mean gateway.quotas.acme.sessions?" in problems
    assert "gateway.issuers.0.sessions" in problems
    assert "gateway.tls.key must be set" in problems


@pytest.mark.usefixtures("shape")
def test_secrets_are_in_no_output(file: Path) -> None:
    file.write_text(
        "[gateway]\npassword = 'hunter2'\n[gateway.quotas.acme]\ntoken = 'hunter2'\n"
        "[[gateway.issuers]]\ntoken = 'hunter2'\n"
    )
    shown = {row.setting: row.value for row in effective("gateway", load("gateway", file=file))}
    assert shown["gateway.password"] == MASK
    assert "hunter2" not in repr(shown)
    (problem,) = refusals("gateway", assignments=["password.x=hunter2"])
    assert "hunter2" not in problem


def test_secrets_among_an_engines_options_are_in_no_output(file: Path) -> None:
    file.write_text(
        "[worker]\nredis_url = 'redis://h'\nengine = 'sglang-server'\n[worker.engine_options]\n"
        "api_key = 'hunter2'\nurl = 'http://me:hunter2@h:1'\nmax_total_tokens = 9\n"
        "admin_api_key = 'hunter2'\n"
    )
    loaded = load("worker", file=file, generated=WORKER_NAME, environment=NO_VARIABLES)
    shown = {row.setting: row.value for row in effective("worker", loaded)}
    assert shown["worker.engine_options"] == {
        "api_key": MASK,
        "url": f"http://{MASK}@h:1",
        "max_total_tokens": "9",
        "admin_api_key": MASK,
    }
    assert ("api_key", "hunter2") in loaded.config.engine_options
    assert "hunter2" not in repr(shown)
    file.write_text("[worker.engine_options]\napi_key = ['hunter2']\n")
    problems = refusals("worker", file=file, generated=WORKER_NAME)
    assert problems
    assert "hunter2" not in repr(problems)


# -- the commands ------------------------------------------------------------------------------


def sessile(*arguments: str, **variables: str) -> Any:
    clean = {"SESSILE_REDIS": "", "SESSILE_CONFIG": "", **variables}
    return CliRunner().invoke(app, list(arguments), env=clean)


def test_check_says_what_is_wrong_and_what_is_still_needed(file: Path) -> None:
    file.write_text('[gateway]\nlisten = "localhost:1"\n')
    good = sessile("config", "check", str(file))
    assert good.exit_code == 0, good.output
    assert "worker.redis_url is not set here" in good.stderr
    file.write_text('[gateway]\nlisten = "h"\nx = 1\n')
    bad = sessile("config", "check", str(file))
    assert bad.exit_code == 1
    assert "gateway.x" in bad.stderr


def test_show_tells_where_settings_are_from_and_hides_passwords() -> None:
    shown = sessile(
        "config", "show", "--process", "gateway", "--json", SESSILE_REDIS="redis://u:hunter2@h/0"
    )
    assert shown.exit_code == 0, shown.output
    assert "SESSILE_REDIS" in shown.stdout
    assert "hunter2" not in shown.output
    assert "max_streams" not in shown.stdout
    loud = sessile("config", "show", "--json", SESSILE_LOG_LEVEL="debug", SESSILE_REDIS="redis://h")
    assert json.loads(loud.stdout)["worker.telemetry.log_level"] == {
        "value": "debug", "from": "SESSILE_LOG_LEVEL",
    }  # fmt: skip
    everything = sessile("config", "show", "--defaults")
    assert "gateway.admission.max_streams" in everything.stdout
    assert "must be set" in everything.stdout


def test_a_process_refuses_settings_as_wrong_use(file: Path) -> None:
    file.write_text("[gateway]\nx = 1\n")
    for arguments in (["gateway", "--config", str(file)], ["gateway", "--set", "x=1"]):
        refused = sessile(*arguments)
        assert refused.exit_code == 2
        assert "unknown setting" in refused.stderr
    for process in ("gateway", "worker"):
        refused = sessile(process, "--redis", "redis://h", "--log-level", "LOUD")
        assert refused.exit_code == 2
        assert "log_level is from --log-level" in refused.stderr


def test_the_reference_is_current_and_complete() -> None:
    text = (ROOT / "docs/SETTINGS.md").read_text()
    assert text == markdown(), "run: sessile config reference > docs/SETTINGS.md"
    for process in ("gateway", "worker"):
        for path, node in settings(schema(process)):
            assert isinstance(node, Group) or f"`{path[-1]}`" in text


def test_loaded_values_are_frozen() -> None:
    made: Loaded = load("gateway", environment=NO_VARIABLES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.config.listen = "x"

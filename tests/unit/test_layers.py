"""Imports point down only: the contracts of .importlinter hold, and each of them can fail."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONTRACTS = ROOT / ".importlinter"

# One forbidden import per contract, in a skeleton of the source tree.
VIOLATIONS = {
    "sessile/client.py": "import gateway.core.errors",
    "sessile/v1/types_pb2.py": "import statestore.records",
    "statestore/records.py": "import sessile.v1.types_pb2",
    "gateway/telemetry/metrics.py": "import gateway.core.errors",
    "gateway/app/turns.py": "import gateway.rpc.status, statestore.redis_store, sessile.client",
    "gateway/core/placement.py": "import statestore.ports",
    "gateway/rpc/status.py": "import redis",
    "workers/runner.py": "import gateway.app.turns",
    "workers/kv/pages.py": "import torch",
    "workers/engines/sglang_server/client.py": "import workers.engines.sglang.engine",
}
CLEAN = (
    "gateway/config.py",
    "gateway/main.py",
    "workers/engines/sglang/engine.py",
    "gateway/core/errors.py",
    "statestore/ports.py",
    "statestore/redis_store.py",
)
PACKAGES = (
    "gateway/core",
    "gateway/app",
    "gateway/cli",
    "gateway/rpc",
    "gateway/security",
    "gateway/telemetry",
    "workers/kv",
    "sessile/v1",
    "loadtest",
    "workers/engines",
    "workers/engines/sglang",
    "workers/engines/sglang_requests",
    "workers/engines/sglang_server",
)


def lint(directory: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from importlinter.cli import lint_imports_command as run; run()"
    return subprocess.run(
        [sys.executable, "-c", code, "--config", ".importlinter", "--no-cache", "--no-logo"],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={"PYTHONPATH": f"{directory}:{directory / 'sdk'}", "COLUMNS": "200"},
    )


def test_every_layer_contract_holds() -> None:
    run = lint(ROOT)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_layer_contract_notices_a_violation(tmp_path: Path) -> None:
    shutil.copy(CONTRACTS, tmp_path)
    for package in PACKAGES:
        for folder in (tmp_path / package, (tmp_path / package).parent):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "__init__.py").touch()
    (tmp_path / "statestore").mkdir()
    (tmp_path / "statestore" / "__init__.py").touch()
    for path in CLEAN:
        (tmp_path / path).touch()
    for path, line in VIOLATIONS.items():
        (tmp_path / path).write_text(line + "\n")

    run = lint(tmp_path)

    config = configparser.ConfigParser()
    config.read(CONTRACTS)
    names = {config[section]["name"] for section in config.sections() if ":contract:" in section}
    assert run.returncode == 1, run.stdout + run.stderr
    broken = set(re.findall(r"^(.+) BROKEN", run.stdout, flags=re.MULTILINE))
    assert broken == names, run.stdout

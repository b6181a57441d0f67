"""Checks of this machine: certificates, ports, a model's folder, limits of the system."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway.cli.findings import Finding, Level, failed, ok, warned

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

EXPIRES_SOON = timedelta(days=14)
MAX_CHAIN = 8
"""Certificates between a process's own and one of the ca."""
FEW_FILES = 256
"""Below so many open files not even a small fleet works."""
SMALL_SHARED_MEMORY = 1 << 30
"""Bytes; sglang's pages, and what its processes tell each other, rarely fit into less."""
SHARED_MEMORY = Path("/dev/shm")
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """One certificate of the settings."""

    setting: str
    """As ``worker.security.tls``."""
    certificate: Path
    key: Path
    ca: Path | None = None
    unchained: Level = Level.OK
    """What it means if the ca has not signed the certificate. OK: it need not have."""


def check_certificate(files: CertificateFiles, now: datetime) -> Finding:
    """Readable, of its key, in its time, signed by the ca where peers will look for that."""
    from cryptography import x509

    check = f"certificate {files.setting}"
    ca: list[Certificate] = []
    try:
        chain = x509.load_pem_x509_certificates(files.certificate.read_bytes())
        files.key.read_bytes()
        if files.ca is not None:
            ca = x509.load_pem_x509_certificates(files.ca.read_bytes())
    except OSError as error:
        return failed(check, str(error), "Correct the path, or let this user read the file.")
    except ValueError as error:
        names = " or ".join(str(path) for path in (files.certificate, files.ca) if path)
        return failed(check, f"{names} holds no certificate: {error}", "Give PEM files.")
    try:
        # A key with a passphrase would ask for it on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(
            files.certificate, files.key, password=lambda: ""
        )
    except ssl.SSLError as error:
        return failed(
            check,
            f"{files.key} is not the key of {files.certificate}: {error.reason or error}",
            "Give the key that the certificate was made with, without a passphrase.",
        )
    renew = "Renew it; a running process reads the new files by itself."
    expires = chain[0].not_valid_after_utc
    until = f"{expires:%Y-%m-%d %H:%M} UTC"
    if expires <= now:
        return failed(check, f"{files.certificate} expired at {until}", renew)
    if chain[0].not_valid_before_utc > now:
        begins = f"{chain[0].not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
        return failed(
            check,
            f"{files.certificate} is valid from {begins} on",
            "Wait, or correct this machine's clock.",
        )
    if files.unchained is not Level.OK and not _signed(chain, ca, now):
        return Finding(
            check,
            files.unchained,
            f"{files.ca} has not signed {files.certificate}, or what signs it there has expired:"
            " gateways and workers that believe this ca refuse it",
            "Use one ca for the fleet; put intermediate certificates behind the process's own.",
        )
    if expires - now < EXPIRES_SOON:
        return warned(check, f"{files.certificate} expires at {until}", renew)
    return ok(check, f"valid until {until}")


def _signed(chain: Sequence[Certificate], ca: Sequence[Certificate], now: datetime) -> bool:
    """Whether a path of signatures leads from the first certificate to one of the ca."""
    from cryptography.exceptions import InvalidSignature

    def issued(certificate: Certificate, issuer: Certificate) -> bool:
        try:
            certificate.verify_directly_issued_by(issuer)
        except (ValueError, TypeError, InvalidSignature):  # another name, kind of key, or key
            return False
        return issuer.not_valid_before_utc <= now < issuer.not_valid_after_utc

    reached = [chain[0]]
    for _ in range(MAX_CHAIN):
        if any(one == root or issued(one, root) for one in reached for root in ca):
            return True
        reached = [link for link in chain[1:] if any(issued(one, link) for one in reached)]
    return False


def check_file(setting: str, path: Path) -> Finding:
    """A file that a process reads."""
    try:
        path.read_bytes()
    except OSError as error:
        return failed(
            f"file {setting}", str(error), "Correct the path, or let this user read the file."
        )
    return ok(f"file {setting}", f"{path} can be read")


def check_directory(setting: str, path: Path) -> Finding:
    """A directory that a process writes into, and makes if it is not there."""
    check = f"directory {setting}"
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return failed(
            check,
            f"{there} is no directory that this user can write into",
            "Give another one, or change its owner.",
        )
    free = shutil.disk_usage(there).free
    return ok(check, f"{path} can be written, {free // MIB} MiB are free")


def check_port(
    setting: str, address: str, answers: Callable[[str], bool | None], *, running: bool = False
) -> Finding:
    """Whether a process can listen there. ``answers`` says of an address that is in use whether a
    Sessile process answers there (None: that cannot be told); it is not asked if the process that
    the settings are of is known to be ``running``."""
    check = f"port {setting}"
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if port == "0":
        return ok(check, f"{host}, a free port is taken")
    try:
        family, kind, _, _, place = socket.getaddrinfo(
            host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except socket.gaierror as error:
        return failed(check, f"{host} is no host: {error}", f"Correct {setting}.")
    except OSError as error:
        if running and error.errno == errno.EADDRINUSE:
            return ok(check, f"{address} is in use; the process that these settings are of runs")
        return _occupied(check, setting, address, error, answers)
    return ok(check, f"{address} is free")


def _occupied(
    check: str,
    setting: str,
    address: str,
    error: OSError,
    answers: Callable[[str], bool | None],
) -> Finding:
    if error.errno == errno.EACCES:
        return failed(
            check,
            f"this user may not listen on {address}",
            f"Set {setting} to a port from 1024 on, or grant CAP_NET_BIND_SERVICE.",
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return failed(
            check,
            f"{address} is no address of this machine",
            f"Set {setting} to one that it has, or to 0.0.0.0.",
        )
    if error.errno != errno.EADDRINUSE:
        return failed(check, f"{address}: {error.strerror}", f"Correct {setting}.")
    # Whoever listens everywhere is asked here.
    host, _, port = address.rpartition(":")
    here = {"0.0.0.0": f"127.0.0.1:{port}", "[::]": f"[::1]:{port}"}.get(host, address)
    ours = answers(here)
    if ours:
        return ok(check, f"a Sessile process answers on {address}")
    if ours is None:
        return warned(
            check,
            f"{address} is in use; by whom cannot be told",
            "If it is not the process that these settings are of, set another port.",
        )
    return failed(
        check,
        f"{address} is in use by something else",
        f"Stop it (`ss -ltnp 'sport = :{port}'` names it), or set {setting} to another port.",
    )


def check_model(engine: str, options: Mapping[str, str], bundled: Path | None) -> Iterator[Finding]:
    """The engine's options, its packages, and the model's folder. ``bundled``: where the bundled
    model is converted to; None: the usual cache folder."""
    from workers.engines import model_store
    from workers.engines.registry import parse_options
    from workers.engines.sglang.config import SglangConfig
    from workers.engines.torch.config import TorchEngineConfig

    check = f"engine {engine}"
    try:
        config = (
            parse_options(TorchEngineConfig, options)
            if engine == "torch"
            else SglangConfig.from_options(options)
        )
    except ValueError as error:
        yield failed(check, str(error), "Correct worker.engine_options.")
        return
    if importlib.util.find_spec(engine) is None:
        yield failed(check, f"{engine} is not installed", f"pip install 'sessile-server[{engine}]'")
    else:
        yield ok(check, "its options are accepted, its packages are installed")
    folder = Path(config.model).expanduser()
    if config.model == model_store.BUNDLED_MODEL:
        cache = model_store.cache_dir() / model_store.CONVERSION
        folder = bundled or cache / model_store.BUNDLED_MODEL
        if not folder.is_dir():
            yield warned(
                "model",
                f"{config.model} is not converted yet: the first start takes half a minute longer",
                "python -m workers.engines.model_store",
            )
            return
    yield check_model_folder(folder)


def check_model_folder(folder: Path) -> Finding:
    """A Hugging Face folder with everything that an engine and its codec read."""
    check = "model"
    download = "Download all of the model's files into one folder, and give that."
    try:
        json.loads((folder / "config.json").read_bytes())
        weights = {path.name for path in folder.glob("*.safetensors")}
        index = folder / "model.safetensors.index.json"
        wanted = _shards(json.loads(index.read_bytes())) if index.is_file() else set()
    except OSError as error:
        return failed(check, f"{folder} is no folder with a model: {error}", download)
    except ValueError as error:
        return failed(check, f"{folder}: config.json or its index is no JSON: {error}", download)
    if missing := sorted(wanted - weights):
        return failed(
            check,
            f"{folder} lacks {len(missing)} of {len(wanted)} files of weights ({missing[0]} …)",
            download,
        )
    if not weights:
        return failed(check, f"{folder} has no weights (*.safetensors)", download)
    try:
        from workers.text.hf_codec import load_hf_codec
        from workers.text.port import TemplateRefused
    except ImportError as error:
        return failed(check, f"the codec needs {error.name}", "pip install 'sessile-server[torch]'")
    try:
        load_hf_codec(folder, lambda: datetime.now(UTC))
    except (TemplateRefused, OSError, ValueError, KeyError) as error:
        return failed(
            check,
            f"{folder}: the tokenizer or the chat template cannot be used: {error}",
            "Give a chat model with tokenizer.json and a chat template that is rendered turn by"
            " turn (docs/ENGINES.md).",
        )
    return ok(
        check, f"{folder}: configuration, weights ({len(weights)} files), tokenizer, template"
    )


def _shards(index: Any) -> set[str]:
    """Files that an index of weights names. Raises ValueError for one of another form."""
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError("no weight_map")
    return set(names.values())


def check_open_files(process: str, needed: int, limits: tuple[int, int]) -> Finding:
    """``limits``: soft and hard, of open files; negative: none."""
    check = f"open files {process}"
    soft, hard = limits
    if soft < 0 or soft >= needed:
        return ok(check, f"{soft if soft >= 0 else 'any number'} may be open")
    room = "" if hard < 0 or hard >= needed else f" (the hard limit is {hard}: raise it too)"
    fix = f"ulimit -n {needed}, or LimitNOFILE={needed} in the unit{room}"
    detail = f"{soft} may be open; with all connections of its settings it has {needed}"
    return failed(check, detail, fix) if soft < FEW_FILES else warned(check, detail, fix)


def check_shared_memory(host_memory_mb: int | None, folder: Path = SHARED_MEMORY) -> Finding:
    """Room for sglang's pages in host memory."""
    check = "shared memory"
    fix = "docker run --shm-size=…, in Kubernetes a volume of medium Memory at /dev/shm"
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return failed(check, str(error), fix)
    detail = f"{folder} has {usage.free // MIB} of {usage.total // MIB} MiB free"
    if host_memory_mb is not None and usage.free < host_memory_mb * MIB:
        return failed(check, f"{detail}; host_memory_mb is {host_memory_mb}", f"{fix}; or lower it")
    if usage.free < SMALL_SHARED_MEMORY:
        return warned(check, f"{detail}, which is little for sglang", fix)
    return ok(check, detail)

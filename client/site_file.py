"""One hospital's own file: private, local, never sent. What is here wins over whatever a study asks.

What was agreed to is not written here by hand: `wardround client enrol` pins the study's digest in the state folder
after a person said yes (client/enrolment.py). Imports neither torch nor Flower nor the study, so that the process
that holds the connection stays small.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from client.labels.terms import LabelCodes
from client.policy import Policy
from client.readers.formats import Format
from common.errors import ConfigurationError
from common.terms import Terms, load

if TYPE_CHECKING:
    from common.study import Study

NAME = r"^[a-z0-9][a-z0-9_-]{0,63}$"
LogLevel = Literal["debug", "info", "warning", "error"]


class ServerTerms(Terms):
    """Where the study's server is, the only place that this client ever talks to.

    Attributes:
        address: `host:port`.
        ca: file with the certificate authority that the server's certificate must come from; nothing else is trusted.
        proxy: `http://[user:password@]host:port`, for all of the traffic. Variables of the environment are not read.
        plaintext: no TLS; on this machine only, for trials.
    """

    address: str
    ca: str | None = None
    proxy: str | None = None
    plaintext: bool = False

    @field_validator("address")
    @classmethod
    def _host_and_port(cls, address: str) -> str:
        host, port = split_address(address)
        if not host or not port:
            raise ValueError("must be `host:port`, such as coordinator.example.org:8443, without https://")
        return address

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        if self.plaintext and self.ca is not None:
            raise ValueError("server.plaintext and server.ca exclude each other; remove plaintext")
        if self.plaintext and self.proxy is not None:
            raise ValueError("server.plaintext and server.proxy exclude each other: a proxy would read all; remove one")
        if self.plaintext and not self.on_this_machine:
            raise ValueError("server.plaintext is for this machine alone (127.0.0.1, ::1, localhost); remove it")
        if not self.plaintext and self.ca is None:
            raise ValueError("server.ca is missing; name the file ca.crt that the coordinator gave to this site")
        if not _is_proxy(self.proxy):  # here, not at the field: its value may hold a password, and would be shown
            raise ValueError("server.proxy must be http://[user:password@]host:port; TLS to the server goes through it")
        return self

    @property
    def host(self) -> str:
        """The name or number that is dialled, and that the certificate must name."""
        return split_address(self.address)[0]

    @property
    def on_this_machine(self) -> bool:
        """The address is a loopback one."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class SiteFile(Terms):
    """A site's settings. Paths that are not absolute count from the folder of the site file.

    Attributes:
        site: this hospital's name in the study.
        study: path of the study file as the coordinator gave it.
        records: MEDS directory with the site's own records.
        format: what the raw extract looks like from which `wardround client convert` writes such a directory.
        label_codes: this site's codes for the words of a task file; `wardround client label` needs them.
        code_map: file by which this site's codes count as the study's (`wardround client map-codes` proposes it, a
            person confirms each entry); it is applied wherever a study reads the records, and stays here.
        splits: which of its patients train.
        exclude: file with the patients who opted out: one column `subject_id`; they are dropped before anything else.
        policy: this site's own limits; they win over the study.
        server: where the server is.
        cohort: name of the patients whose budget is charged, where one ledger holds several cohorts; then they are
            listed in it, by keyed digests. Absent: all patients of this hospital, not listed.
        state: folder for key, enrolment, ledger and log, for this user alone.
        ledger: the ledger of another state folder, to take part in two studies at the same time on one budget.
        anchor: file on another disk that remembers the ledger's head, against a ledger put back from a copy.
        device: where to train; wins over the study's.
        log_level: what goes to the log.
    """

    version: Literal[1]
    site: str = Field(pattern=NAME)
    study: str
    records: str
    format: Format | None = None
    label_codes: LabelCodes | None = None
    code_map: str | None = None
    splits: tuple[Literal["train", "tuning"], ...] = Field(default=("train",), min_length=1)
    exclude: str | None = None
    policy: Policy
    server: ServerTerms
    cohort: str | None = Field(default=None, pattern=NAME)
    state: str
    ledger: str | None = None
    anchor: str | None = None
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    log_level: LogLevel = "info"

    @field_validator("splits")
    @classmethod
    def _once(cls, splits: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(splits)) != len(splits):
            raise ValueError("names a split twice; name each once")
        return splits


def load_site_file(path: Path) -> SiteFile:
    """Read a site file; its paths come back absolute.

    Raises:
        ConfigurationError: names file, key, value, bound and remedy.
    """
    site = load(path, SiteFile)
    base = path.absolute().parent

    def absolute(name: str | None) -> str | None:
        return None if name is None else str(base / Path(name).expanduser())

    paths = ("study", "records", "code_map", "exclude", "state", "ledger", "anchor")
    named = {key: absolute(getattr(site, key)) for key in paths}
    server = site.server.model_copy(update={"ca": absolute(site.server.ca)})
    return site.model_copy(update={**named, "server": server})


def study_of(site: SiteFile) -> Study:
    """The study that the site file names.

    Raises:
        ConfigurationError: a fault in the study file, or the site is not in it.
    """
    from common.study import load_study

    study = load_study(Path(site.study))
    if site.site not in study.sites:
        raise ConfigurationError(
            f"{site.study}: has no site `{site.site}`, only {', '.join(study.sites)}; correct `site` in the site file, "
            "or ask the coordinator for the newest study file"
        )
    return study


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port` -> (host, port); ("", 0) where it is neither."""
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    plain = host and not set(host) & set("/@[]: \t?#")
    if not (bracketed or plain) or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
        return "", 0
    return host.strip("[]"), int(port)


def _is_proxy(proxy: str | None) -> bool:
    try:
        parts = urlsplit(proxy or "")
        return proxy is None or (parts.scheme == "http" and bool(parts.hostname) and bool(parts.port))
    except ValueError:
        return False

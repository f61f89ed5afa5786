"""A study's folder at the coordinator: terms, roster, certificates and state.

    study.yaml     the study, features inlined: the one file that hospitals get, and read
    ca.crt         the study's certificate authority: hospitals get it too
    roster.yaml    site -> its public key; `wardround server admit` writes it
    server.yaml    where to listen, under which names, for how long to wait
    private/       keys; 0700, each file 0600
    state/         what a run writes: checkpoint, metrics, log, Flower's database

Nothing else is written anywhere. The state may lie elsewhere (`state:` in server.yaml), on a larger disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from pydantic import Field

from common import keys
from common.errors import ConfigurationError
from common.terms import Terms, load
from server import certificates
from server.files import held, write_atomically

if TYPE_CHECKING:
    from common.study import Study  # loads the accountant, a second; a server that resumes answers sooner without

PORT, DEADLINE = 8643, 600.0


class ServerTerms(Terms):
    """server.yaml. `study` is the digest of study.yaml, which must not change once hospitals have it."""

    version: Literal[1] = 1
    study: str = Field(pattern="^[0-9a-f]{64}$")
    host: str = "0.0.0.0"  # noqa: S104 (hospitals call from outside; what is served there is the point of server.public)
    port: int = Field(default=PORT, ge=1, le=65535)
    names: tuple[str, ...] = Field(min_length=1)
    deadline_seconds: float = Field(default=DEADLINE, ge=1, le=7 * 86400)
    state: str = "state"


class Roster(Terms):
    """roster.yaml: the sites that may connect, each with one line of OpenSSH."""

    version: Literal[1] = 1
    sites: dict[str, Annotated[str, Field(max_length=keys.MAX_KEY_BYTES)]] = Field(default_factory=dict)


@dataclass(frozen=True)
class ServerFolder:
    """An existing study folder; see the module docstring."""

    path: Path
    terms: ServerTerms

    @property
    def state(self) -> Path:
        """Folder that a run writes to."""
        return self.path / self.terms.state

    @property
    def authority(self) -> Path:
        """The authority's certificate, for hospitals."""
        return self.path / "ca.crt"

    @property
    def certificate(self) -> Path:
        """The server's certificate."""
        return self.path / "private" / "server.crt"

    @property
    def key(self) -> Path:
        """The server's key."""
        return self.path / "private" / "server.key"

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint; written by `server.checkpoint`."""
        return self.state / "checkpoint.safetensors"

    @property
    def metrics(self) -> Path:
        """A line a round; written by `server.progress`."""
        return self.state / "metrics.jsonl"

    def study(self) -> Study:
        """The study's terms. Raises ConfigurationError: no longer those of `init`."""
        from common.study import load_study

        study = load_study(self.path / "study.yaml")
        if study.digest() != self.terms.study:
            raise ConfigurationError(
                f"{self.path / 'study.yaml'}: digest {study.digest()[:12]}, was {self.terms.study[:12]} when the "
                "folder was made, and hospitals pin that; put the file back, or make a new folder for another study"
            )
        return study

    def roster(self) -> dict[str, EllipticCurvePublicKey]:
        """Site -> key. Raises ConfigurationError: an entry is no P-384 key, or a key stands twice."""
        path = self.path / "roster.yaml"
        found: dict[str, EllipticCurvePublicKey] = {}
        for site, line in load(path, Roster).sites.items():
            key = keys.load_public(line, f"{path}: {site}")
            _not_anothers(key, site, found)
            found[site] = key
        return found

    def admit(self, site: str, key: EllipticCurvePublicKey, *, replace: bool = False) -> bool:
        """Put a site's key on the roster; False: it stands there already.

        Args:
            replace: take the key instead of the one that the site has.

        Raises:
            ConfigurationError: no site of the study, another site's key, or a second key without `replace`.
        """
        with held(self.path / "roster.lock", f"{self.path}/roster.yaml"):  # two at once would lose a key
            return self._admit(site, key, replace=replace)

    def _admit(self, site: str, key: EllipticCurvePublicKey, *, replace: bool) -> bool:
        study, roster = self.study(), self.roster()
        if site not in study.sites:
            raise ConfigurationError(
                f"site `{site}` is not in study {study.name}, which has {', '.join(study.sites)}; add it to the sites "
                "of study.yaml (other hospitals need not agree again)"
            )
        _not_anothers(key, site, roster)
        if site in roster and keys.public_line(roster[site]) == keys.public_line(key):
            return False
        if site in roster and not replace:
            raise ConfigurationError(
                f"site `{site}` has the key {keys.fingerprint(roster[site])} on the roster; `--replace` takes the new "
                "one instead, after a telephone call with the site"
            )
        lines = {name: keys.public_line(one) for name, one in sorted({**roster, site: key}.items())}
        write_atomically(self.path / "roster.yaml", _yaml(Roster(sites=lines)))
        return True

    def renew_certificate(self, names: tuple[str, ...] = ()) -> x509.Certificate:
        """A new server key and certificate from the study's authority; hospitals notice nothing. `names`: new ones."""
        issuer_key = keys.load_private(self.path / "private" / "ca.key")
        issuer = read_certificate(self.authority)
        terms = self.terms.model_copy(update={"names": _checked(names)}) if names else self.terms
        key = keys.generate()
        certificate = certificates.server_certificate(key, terms.names, issuer, issuer_key)
        write_atomically(self.key, certificates.key_pem(key), mode=0o600)
        write_atomically(self.certificate, certificates.pem(certificate), mode=0o600)
        write_atomically(self.path / "server.yaml", _yaml(terms))
        return certificate


def create(path: Path, study: Study, names: tuple[str, ...], *, port: int = PORT) -> ServerFolder:
    """Make a study's folder. Raises ConfigurationError: it exists, no such name, or a study without noise."""
    if study.privacy.epsilon is None:
        raise ConfigurationError("privacy.epsilon: null trains without privacy, which is for simulations; set a budget")
    terms = ServerTerms(study=study.digest(), names=_checked(names), port=port)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigurationError(f"{path} exists and is not empty; name a new folder")
    path.mkdir(parents=True, exist_ok=True)
    for private in (path / "private", path / terms.state):
        private.mkdir(mode=0o700)
    folder = ServerFolder(path, terms)
    key = keys.generate()
    keys.write_private(path / "private" / "ca.key", keys.private_to_pem(key))
    write_atomically(folder.authority, certificates.pem(certificates.authority(key, study.name)))
    write_atomically(path / "study.yaml", study_yaml(study))
    write_atomically(path / "roster.yaml", _yaml(Roster()))
    folder.renew_certificate()
    folder.study()  # what was written is what was read, or hospitals would pin another study
    return folder


def open_folder(path: Path) -> ServerFolder:
    """Open a study's folder, given itself or its study file. Raises ConfigurationError: it is none."""
    folder = path if path.is_dir() else path.parent
    if not (folder / "server.yaml").exists():
        raise ConfigurationError(
            f"{path}: no study folder (it has no server.yaml); make one with `wardround server init`"
        )
    terms = load(folder / "server.yaml", ServerTerms)
    for name in terms.names:
        certificates.check_name(name)
    (folder / terms.state).mkdir(mode=0o700, exist_ok=True)
    return ServerFolder(folder, terms)


def read_certificate(path: Path) -> x509.Certificate:
    """Read a certificate file. Raises ConfigurationError."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{path}: no certificate ({type(error).__name__}); put it back, or run "
            "`wardround server init --renew-certificate`"
        ) from None


def study_yaml(study: Study) -> bytes:
    """A study as one file, without what concerns simulations only."""
    terms = study.model_dump(mode="json", exclude_none=True, exclude={"simulation"})
    terms["privacy"]["epsilon"] = study.privacy.epsilon
    return yaml.safe_dump(terms, sort_keys=False, allow_unicode=True).encode()


def _yaml(terms: Terms) -> bytes:
    return yaml.safe_dump(terms.model_dump(mode="json"), sort_keys=False).encode()


def _checked(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names:
        raise ConfigurationError("no name: give with --name the host name or address that sites dial")
    return tuple(dict.fromkeys(certificates.check_name(name) for name in names))


def _not_anothers(key: EllipticCurvePublicKey, site: str, roster: dict[str, EllipticCurvePublicKey]) -> None:
    """A key names one site: replies are told apart by key."""
    for other, theirs in roster.items():
        if other != site and keys.public_line(theirs) == keys.public_line(key):
            raise ConfigurationError(
                f"site `{site}`: this is site `{other}`'s key; each site makes its own with `wardround client keygen`"
            )

"""What a person at the hospital said yes to, pinned in the state folder; whatever differs from it later is refused.

Pinned are the study's terms (by digest), the size that this site publishes, the site's own policy, whose records train
(directory, splits, file of opt-outs by name: its content may grow), and the authority that the server's certificate
comes from. Whoever enrolled has a ledger: one that is gone later is refused (client/entry_file.py). A renewed
certificate of the same authority changes nothing; another
authority may be another server. `wardround client enrol` asks again; nothing else writes this file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field

from client.network import authority_digest
from client.site_file import SiteFile
from client.state import ENROLMENT, StateFolder
from common.errors import ConfigurationError
from common.terms import Terms, parse

if TYPE_CHECKING:
    from common.study import Study

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Fingerprint = Annotated[str, Field(pattern=r"^(?:[0-9a-f]{64})?$")]
AGAIN = "run `wardround client enrol` to see the terms and decide anew, or put back what was agreed"


class Enrolment(Terms):
    """A pinned yes.

    Attributes:
        study: digest of the study's terms (`Study.digest`); `name` is for people.
        site, declared_patients: as whom, and the size that was agreed to publish.
        policy: digest of the site's policy.
        records, splits, exclude: the records' directory, which of their splits train, and the file of opt-outs. The
            first wardround did not pin them: such a yes is read, and asked for again.
        authority: sha256 of the server's certificate authority; "" for plaintext on this machine.
        certificate: sha256 of the certificate that the server showed; for people, not compared.
        time: when, UTC.
    """

    version: Literal[1] = 1
    study: Digest
    name: str
    site: str
    declared_patients: int
    policy: Digest
    records: str | None = None
    splits: tuple[str, ...] = ()
    exclude: str | None = None
    authority: Fingerprint
    certificate: Fingerprint
    time: str

    @classmethod
    def of(cls, site: SiteFile, study: Study, certificate: str, time: str) -> Self:
        """What would be pinned now."""
        return cls(
            study=study.digest(),
            name=study.name,
            site=site.site,
            declared_patients=study.sites[site.site].declared_patients,
            policy=site.policy.digest(),
            records=site.records,
            splits=site.splits,
            exclude=site.exclude,
            authority=authority_digest(site.server),
            certificate=certificate,
            time=time,
        )

    @classmethod
    def read(cls, state: StateFolder) -> Self | None:
        """The pinned yes, or None. Raises ConfigurationError if the file cannot be used."""
        data = state.read_json(ENROLMENT)
        return None if data is None else parse(data, cls, str(state / ENROLMENT))

    def write(self, state: StateFolder) -> None:
        """Pin it."""
        state.write_json(ENROLMENT, self.model_dump(mode="json"))

    def require_site(self, site: SiteFile, authority: str | None = None) -> None:
        """Raise ConfigurationError unless site name, policy, records and authority are what was agreed to.

        Args:
            authority: `authority_digest` as read before; None reads it now.
        """
        if site.site != self.site:
            raise ConfigurationError(f"site file: site `{site.site}`, but `{self.site}` was enrolled; {AGAIN}")
        if site.policy.digest() != self.policy:
            raise ConfigurationError(f"site file: the policy has changed since {self.time}; {AGAIN}")
        for name in ("records", "splits", "exclude"):
            now, agreed = getattr(site, name), getattr(self, name)
            if now != agreed:
                then = "not pinned" if self.records is None else agreed
                raise ConfigurationError(f"site file: `{name}` is {now}, on {self.time} it was {then}; {AGAIN}")
        if (authority_digest(site.server) if authority is None else authority) != self.authority:
            raise ConfigurationError(
                f"{site.server.ca or 'site file'}: another certificate authority than the one enrolled with on "
                f"{self.time}; ask the coordinator, over a way that you trust, whether it changed; then {AGAIN}"
            )

    def require_study(self, site: SiteFile, study: Study) -> None:
        """Raise ConfigurationError unless the study is the one that was agreed to."""
        if study.digest() != self.study:
            raise ConfigurationError(
                f"{site.study}: the study's terms are {study.digest()[:12]}.., enrolled on {self.time} were "
                f"{self.study[:12]}..; {AGAIN}"
            )
        declared = study.sites[site.site].declared_patients
        if declared != self.declared_patients:
            raise ConfigurationError(
                f"{site.study}: declares {declared} patients for {site.site}, agreed were {self.declared_patients}; "
                f"{AGAIN}"
            )


def enrolled(state: StateFolder, site: SiteFile, authority: str | None = None) -> Enrolment:
    """The pinned yes, if this site file still agrees with it, see `require_site`. Raises ConfigurationError."""
    found = Enrolment.read(state)
    if found is None:
        raise ConfigurationError(f"{state.path}: not enrolled yet; run `wardround client enrol` first")
    found.require_site(site, authority)
    return found

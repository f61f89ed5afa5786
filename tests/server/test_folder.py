"""A study's folder: what `init` makes, who gets on the roster, and what is refused in one line."""

from __future__ import annotations

import os
import ssl
import stat
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from typer.testing import CliRunner

from common.errors import ConfigurationError
from common.keys import fingerprint, generate, private_to_pem, public_line
from common.models.network import build_network
from common.study import load_study
from common.training import state_of
from server import certificates
from server.checkpoint import load
from server.commands import app
from server.files import held
from server.folder import ServerFolder, create, open_folder, read_certificate, study_yaml
from tests.server.processes import ROOT
from tests.small import small_study

STUDY = small_study()


def command(*arguments: object) -> str:
    """What `wardround server ...` prints. Raises what it raises."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> ServerFolder:
    return create(tmp_path / "study", STUDY, ("hub.example.org",))


def new_key() -> EllipticCurvePublicKey:
    return generate().public_key()


def key_file(path: Path, key: EllipticCurvePublicKey) -> Path:
    path.write_text(public_line(key) + "\n")
    return path


def test_init_makes_a_study_that_can_be_run(tmp_path: Path) -> None:
    """The command writes study, roster, certificates and starting weights, and says what hospitals need."""
    (tmp_path / "given.yaml").write_bytes(study_yaml(STUDY))
    said = command(
        "init", tmp_path / "d", "--study", tmp_path / "given.yaml", "--name", "Hub.Example.org", "--port", 77
    )
    folder = open_folder(tmp_path / "d" / "study.yaml")
    assert folder.study() == STUDY.model_copy(update={"simulation": folder.study().simulation})
    assert (folder.terms.names, folder.terms.port) == (("hub.example.org",), 77)
    assert folder.roster() == {}
    start = load(folder.checkpoint, STUDY.digest())
    expected = state_of(build_network(STUDY))
    assert start.round_number == 0
    assert all((start.weights[name] == expected[name]).all() for name in expected)
    for part in (STUDY.digest(), "ca.crt", "hub.example.org", "port 77", "east, north", "by telephone"):
        assert part in said


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
def test_what_is_private_is_the_owners_alone(folder: ServerFolder) -> None:
    """Keys are 0600 in a folder of 0700, as is the state; what hospitals get is readable."""
    modes = {p.relative_to(folder.path).as_posix(): stat.S_IMODE(p.stat().st_mode) for p in folder.path.rglob("*")}
    assert {name: mode for name, mode in modes.items() if name.startswith(("private", "state"))} == {
        "private": 0o700,
        "private/ca.key": 0o600,
        "private/server.key": 0o600,
        "private/server.crt": 0o600,
        "state": 0o700,
    }
    assert modes["study.yaml"] == modes["ca.crt"] == 0o644


def test_the_study_in_the_folder_stands_alone(tmp_path: Path) -> None:
    """Features are inlined: the one file, anywhere, is the same study; what concerns simulations is left out."""
    demo = load_study(ROOT / "configs/demo.yaml")
    made = create(tmp_path / "d", demo, ("hub",))
    moved = tmp_path / "elsewhere.yaml"
    moved.write_bytes((made.path / "study.yaml").read_bytes())
    assert load_study(moved).digest() == demo.digest()
    assert "simulation" not in yaml.safe_load(moved.read_text())


def test_the_certificate_is_for_its_names_and_this_machine(folder: ServerFolder) -> None:
    """SubjectAltName has the names of --name and loopback; TLS accepts it for them under the study's authority."""
    certificate = read_certificate(folder.certificate)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["hub.example.org", "localhost"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1", "::1"]
    authority = read_certificate(folder.authority)
    certificate.verify_directly_issued_by(authority)
    days = authority.not_valid_after_utc - authority.not_valid_before_utc, certificates.days_left(certificate)
    assert days[0].days >= 3652
    assert 396 <= days[1] <= 398
    for name, good in (("hub.example.org", True), ("localhost", True), ("other.example.org", False)):
        assert handshake(folder, name) == good


def handshake(folder: ServerFolder, name: str) -> bool:
    """Whether a client that trusts ca.crt, strictly, takes the server for `name`; in memory."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder.certificate, folder.key)
    client = ssl.create_default_context(cafile=folder.authority)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    done = [False, False]
    for _ in range(10):
        for index, side in enumerate(sides):
            if not done[index]:
                try:
                    side.do_handshake()
                    done[index] = True
                except ssl.SSLWantReadError:
                    pass
                except ssl.SSLError:
                    return False
    return all(done)


def test_renewing_changes_the_certificate_and_not_the_authority(folder: ServerFolder) -> None:
    """A new key and certificate, from the authority that hospitals have; names change if new ones are given."""
    before = read_certificate(folder.certificate), folder.authority.read_bytes()
    said = command("init", folder.path, "--renew-certificate")
    after = read_certificate(folder.certificate)
    assert folder.authority.read_bytes() == before[1]
    assert after.serial_number != before[0].serial_number
    assert after.public_key() != before[0].public_key()
    assert handshake(folder, "hub.example.org")
    assert "hub.example.org" in said
    command("init", folder.path, "--renew-certificate", "--name", "10.1.2.3")
    assert open_folder(folder.path).terms.names == ("10.1.2.3",)
    assert not handshake(folder, "hub.example.org")
    assert stat.S_IMODE(folder.key.stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["https://hub", "hub:443", "*.example.org", "", "a b", "-x", "hub/", "x" * 64])
def test_a_name_is_what_sites_dial(tmp_path: Path, name: str) -> None:
    """A host name or an address; no scheme, port, path or wildcard. Nothing is written when it is refused."""
    with pytest.raises(ConfigurationError, match="must be a host name or an IP address"):
        create(tmp_path / "d", STUDY, (name,))
    assert not (tmp_path / "d").exists()


def test_init_refuses_what_cannot_be_served(tmp_path: Path, folder: ServerFolder) -> None:
    """A folder with something in it, a study without noise, no name, no study."""
    with pytest.raises(ConfigurationError, match="exists and is not empty; name a new folder"):
        create(folder.path, STUDY, ("hub",))
    with pytest.raises(ConfigurationError, match="null trains without privacy, which is for simulations"):
        create(tmp_path / "d", small_study(privacy={"epsilon": None}), ("hub",))
    with pytest.raises(ConfigurationError, match=r"needs --study STUDY.yaml and at least one --name"):
        command("init", tmp_path / "d", "--name", "hub")
    with pytest.raises(ConfigurationError, match="leave --study and --port out"):
        command("init", folder.path, "--renew-certificate", "--port", 5)


def test_admit_puts_a_key_on_the_roster_and_shows_its_digits(tmp_path: Path, folder: ServerFolder) -> None:
    """The command prints the fingerprint to compare by telephone; the same key again changes nothing."""
    key = new_key()
    path = key_file(tmp_path / "north.pub", key)
    for word in ("now", "already"):
        said = command("admit", folder.path, "north", path)
        assert f"north is {word} on the roster" in said
        assert fingerprint(key) in said
    assert {site: public_line(one) for site, one in folder.roster().items()} == {"north": public_line(key)}


def test_a_site_has_one_key_and_a_key_one_site(folder: ServerFolder) -> None:
    """Another site's key is refused; a second key needs --replace; a name outside the study is refused."""
    north, second = new_key(), new_key()
    assert folder.admit("north", north)
    with pytest.raises(ConfigurationError, match="site `east`: this is site `north`'s key"):
        folder.admit("east", north)
    with pytest.raises(ConfigurationError, match=r"has the key .* on the roster; `--replace`"):
        folder.admit("north", second)
    with pytest.raises(ConfigurationError, match="site `west` is not in study small, which has east, north"):
        folder.admit("west", second)
    assert folder.admit("north", second, replace=True)
    assert folder.admit("east", north)
    assert {site: public_line(key) for site, key in folder.roster().items()} == {
        "north": public_line(second),
        "east": public_line(north),
    }


def test_two_admissions_at_once_lose_no_key(folder: ServerFolder) -> None:
    """While one process changes the roster, another is told so and changes nothing; afterwards it may."""
    with held(folder.path / "roster.lock", "roster"), pytest.raises(ConfigurationError, match="in use by another"):
        folder.admit("north", generate().public_key())
    assert folder.roster() == {}
    assert folder.admit("north", generate().public_key())


def test_admit_wants_a_public_p384_key(tmp_path: Path, folder: ServerFolder) -> None:
    """A private key by mistake, or another curve, is refused and the roster stays."""
    (tmp_path / "key").write_bytes(private_to_pem(generate()))
    with pytest.raises(ConfigurationError, match="is a private key, which never leaves its site"):
        command("admit", folder.path, "north", tmp_path / "key")
    assert folder.roster() == {}


def test_a_roster_by_hand_is_checked(folder: ServerFolder) -> None:
    """One key under two names, or a line that is no key, names the file and the site."""
    line = public_line(new_key())
    for sites, said in (
        ({"north": line, "east": line}, "this is site `(north|east)`'s key"),
        ({"north": "ssh-rsa AAAA"}, "roster.yaml: north: not an OpenSSH public key"),
    ):
        (folder.path / "roster.yaml").write_text(yaml.safe_dump({"version": 1, "sites": sites}))
        with pytest.raises(ConfigurationError, match=said):
            folder.roster()


def test_a_study_that_changed_under_the_hospitals_is_refused(folder: ServerFolder) -> None:
    """Terms that count are pinned; a new site is not among them."""
    terms = yaml.safe_load((folder.path / "study.yaml").read_text())
    (folder.path / "study.yaml").write_text(
        yaml.safe_dump(terms | {"sites": {**terms["sites"], "west": {"declared_patients": 90}}})
    )
    assert folder.admit("west", new_key())
    (folder.path / "study.yaml").write_text(yaml.safe_dump(terms | {"quorum": 1}))
    with pytest.raises(ConfigurationError, match="hospitals pin that; put the file back, or make a new folder"):
        folder.study()


def test_no_folder_is_one_line(tmp_path: Path) -> None:
    """A path without server.yaml says how to make one."""
    with pytest.raises(ConfigurationError, match=r"no study folder .*; make one with `wardround server init`"):
        open_folder(tmp_path / "study.yaml")


def test_an_expired_certificate_says_how_to_renew_it(folder: ServerFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server does not start with it."""
    from server import coordinator

    monkeypatch.setattr(coordinator, "days_left", lambda _certificate: -3.0)
    with pytest.raises(ConfigurationError, match=r"expired 3 days ago; run .* --renew-certificate"):
        coordinator._checked_tls(folder, lambda _line: None)
    said: list[str] = []
    monkeypatch.setattr(coordinator, "days_left", lambda _certificate: 12.0)
    coordinator._checked_tls(folder, said.append)
    assert "expires in 12 days" in said[0]

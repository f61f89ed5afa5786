"""The site file: a hospital's own words, refused with one line where they cannot be meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from client.site_file import ServerTerms, load_site_file, split_address, study_of
from common.errors import ConfigurationError
from common.terms import parse

EXAMPLE = Path(__file__).resolve().parents[2] / "configs" / "sites" / "north.yaml"


def changed(folder: Path, **changes: Any) -> Path:
    """The example with some keys changed, in `folder`."""
    terms = yaml.safe_load(EXAMPLE.read_text()) | {"study": str(EXAMPLE.parent.parent / "demo.yaml")} | changes
    (folder / "site.yaml").write_text(yaml.safe_dump(terms))
    return folder / "site.yaml"


def test_the_shipped_example_fits_the_shipped_study() -> None:
    """configs/sites/north.yaml loads, and its policy admits configs/demo.yaml as it is."""
    site = load_site_file(EXAMPLE)
    study = study_of(site)
    assert site.site in study.sites
    site.policy.check(study)


def test_paths_count_from_the_site_files_folder(tmp_path: Path) -> None:
    """Every path comes back absolute, wherever the command is started."""
    server = {"address": "x:1", "ca": "ca.crt"}
    site = load_site_file(changed(tmp_path, records="meds", exclude="o.csv", state="s", anchor="a", server=server))
    assert (site.records, site.exclude, site.state, site.anchor, site.server.ca) == tuple(
        str(tmp_path / name) for name in ("meds", "o.csv", "s", "a", "ca.crt")
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"recordz": "x"}, "did you mean `records`"),
        ({"policy": {"max_epsilon": -1.0, "delta": 1e-5}}, "max_epsilon"),
        ({"policy": {"delta": 1e-5}}, "`policy.max_epsilon` is missing"),
        ({"site": "North Hospital"}, "`site`"),
        ({"splits": []}, "`splits`"),
        ({"splits": ["train", "train"]}, "names a split twice"),
        ({"splits": ["held_out"]}, "`splits"),
        ({"server": {"address": "x:1"}}, "server.ca is missing; name the file ca.crt"),
        ({"server": {"address": "https://x:1", "ca": "c"}}, "must be `host:port`"),
        ({"server": {"address": "x", "ca": "c"}}, "must be `host:port`"),
        ({"server": {"address": "10.1.1.1:80", "plaintext": True}}, "plaintext is for this machine alone"),
        ({"server": {"address": "localhost:80", "plaintext": True, "ca": "c"}}, "exclude each other"),
    ],
)
def test_a_site_file_that_cannot_be_meant_is_refused(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    """A typing error, an impossible limit and a server that would be reached without TLS are one clear error each."""
    with pytest.raises(ConfigurationError, match=expected):
        load_site_file(changed(tmp_path, **changes))


@pytest.mark.parametrize("proxy", ["proxy:3128", "socks5://p:1", "http://p", "https://p:1", "http://user:PASSWORD@[:1"])
def test_a_proxy_is_an_http_url_and_its_password_is_not_shown(proxy: str) -> None:
    """What is no http://host:port is refused without echoing it."""
    with pytest.raises(ConfigurationError, match=r"server\.proxy must be") as caught:
        parse({"address": "x:1", "ca": "c", "proxy": proxy}, ServerTerms, "site")
    assert "PASSWORD" not in str(caught.value)


def test_plaintext_goes_through_no_proxy() -> None:
    """A proxy would carry plaintext to another machine: the two exclude each other."""
    with pytest.raises(ConfigurationError, match=r"plaintext and server\.proxy exclude each other"):
        parse({"address": "localhost:1", "plaintext": True, "proxy": "http://proxy:3128"}, ServerTerms, "site")


@pytest.mark.parametrize("address", ["localhost:1", "127.0.0.1:80", "127.9.9.9:80", "[::1]:80"])
def test_plaintext_stays_on_this_machine(address: str) -> None:
    """Every loopback address may do without TLS, when a person says so."""
    assert parse({"address": address, "plaintext": True}, ServerTerms, "site").on_this_machine


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("a.example:8443", ("a.example", 8443)),
        ("[::1]:80", ("::1", 80)),
        ("::1:80", ("", 0)),
        ("a:0", ("", 0)),
        ("a:65536", ("", 0)),
        ("a:b", ("", 0)),
        ("user@a:80", ("", 0)),
        ("a/b:80", ("", 0)),
        (":80", ("", 0)),
    ],
)
def test_addresses(address: str, expected: tuple[str, int]) -> None:
    """Only a host and a port are an address."""
    assert split_address(address) == expected


def test_a_site_that_is_not_in_the_study_is_refused(tmp_path: Path) -> None:
    """The study must know the site, by its name."""
    with pytest.raises(ConfigurationError, match="has no site `nowhere`, only east, north, south, west"):
        study_of(load_site_file(changed(tmp_path, site="nowhere")))

"""Strict terms: whatever stands in a file, it is read as it says or refused in one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Discriminator, Field, Tag, ValidationError

from common.errors import ConfigurationError
from common.terms import MAX_FILE_BYTES, Terms, load, parse, read_yaml


class Ward(Terms):
    beds: int = Field(ge=1, le=100)
    share: float = Field(default=0.5, gt=0, le=1)


class Fixed(Terms):
    kind: Literal["fixed"]
    levels: tuple[float, ...] = ()


class Open(Terms):
    kind: Literal["open"]
    centre: float


class Hospital(Terms):
    name: str
    wards: dict[str, Ward] = Field(default_factory=dict)
    best: Ward | None = None
    history: tuple[Ward, ...] = ()
    inputs: dict[
        str,
        Annotated[
            Annotated[Fixed, Tag("levels")] | Annotated[Open, Tag("open")],
            Discriminator(lambda static: "open" if isinstance(static, dict) and "centre" in static else "levels"),
        ],
    ] = Field(default_factory=dict)
    teaching: bool = False


def write(folder: Path, text: str | bytes, name: str = "site.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(path: Path, model: type[Terms] = Hospital) -> str:
    """The message with which a file is refused; it names the file."""
    with pytest.raises(ConfigurationError) as caught:
        load(path, model)
    error = caught.value
    assert error.__cause__ is None
    assert error.__context__ is None or error.__suppress_context__  # no traceback of another error behind it
    assert str(path) in str(error)
    return str(error)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected a mapping"),
        ("- name: a", "expected a mapping"),
        ("just words", "expected a mapping"),
        ("name: [", "line 1: not valid YAML"),
        ("name: a\n\tbeds: 3", "line 2: not valid YAML"),
        ("name: a\x00", "not valid YAML"),
        (b"name: \xff\xfe", "UTF-8"),
        ("name: a".encode("utf-16"), "UTF-8"),
        ("name: &a x\nbest: *a", "line 2: YAML aliases"),
        ("name: a\nname: b", "line 2: key `name` appears twice"),
        ("name: a\nwards: {x: {beds: 1, beds: 2}}", "line 2: key `beds` appears twice"),
        ('"\\ud800": 1\n"\\ud800": 2', "key `\\ud800` appears twice"),
        ("? [a, b]\n: 1", "line 1: a key must be a plain word"),
        ("? {a: b}\n: 1", "line 1: a key must be a plain word"),
        ("null: 1", "line 1: a key must be a plain word"),
        ("<<: {name: a}", "not valid YAML"),
        ("---\nname: a\n---\nname: b", "another document"),
        ("!!python/object/apply:os.system [true]", "python/object"),
        ("[" * 100_000, "not valid YAML"),
        ("name: !!bool maybe", "not valid YAML"),
        ("name: !!timestamp never", "not valid YAML"),
        ("name: !!int ''", "not valid YAML"),
        ("name: 2020-13-45", "not valid YAML"),
        ("name: " + "9" * 5000, "not valid YAML"),
    ],
)
def test_a_file_that_is_not_plain_yaml_is_refused(tmp_path: Path, text: str | bytes, says: str) -> None:
    """A broken, ambiguous or active file is one error that names file and, where there is one, line."""
    assert says in refusal(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: a\nwards: {x: {bed: 1}}", "unknown key `wards.x.bed`; did you mean `beds`?"),
        ("nam: a", "unknown key `nam`; did you mean `name`?"),
        ("name: a\nbest: {beds: 1, shar: 1}", "unknown key `best.shar`; did you mean `share`?"),
        (
            "name: a\nhistory: [{beds: 1}, {beds: 1, shares: 1}]",
            "unknown key `history.1.shares`; did you mean `share`?",
        ),
        ("name: a\nqqqqqq: 1", "unknown key `qqqqqq`; known keys: best, history, inputs, name, teaching, wards"),
        ("name: a\nwards: {beds: {bed: 1}}", "unknown key `wards.beds.bed`; did you mean `beds`?"),
        ("name: a\ninputs: {x: {kind: fixed, levels: [1], level: 2}}", "`inputs.x.level`; did you mean `levels`?"),
        ("name: a\ninputs: {x: {kind: open, centre: y}}", "`inputs.x.centre`: "),
        ("name: a\ninputs: {x: {kind: fixed, levels: [y]}}", "`inputs.x.levels.0`: "),
        ("name: a\ninputs: {x: 3}", "`inputs.x`: "),
        ("wards: {}", "key `name` is missing; add it"),
        ("name: a\nwards: {x: {}}", "key `wards.x.beds` is missing; add it"),
        ("name: a\nwards: {x: {beds: 0}}", "`wards.x.beds`: Input should be greater than or equal to 1 (got 0)"),
        ("name: a\nwards: {x: {beds: 101}}", "`wards.x.beds`: Input should be less than or equal to 100 (got 101)"),
        ("name: a\nwards: {x: {beds: many}}", "`wards.x.beds`: "),
        ("name: a\nwards: {x: {beds: 1.5}}", "`wards.x.beds`: "),
        ("name: a\nwards: {x: {beds: yes}}", "`wards.x.beds`: yes, no, true and false stand for no number"),
        ("name: a\nteaching: 1", "`teaching`: a number stands for no answer here; write true or false"),
        ("name: a\nwards: {x: {beds: [1]}}", "`wards.x.beds`: "),
        ("name: a\nwards: {x: {beds: 0x" + "f" * 5000 + "}}", "`wards.x.beds`: "),
        ("name: a\nwards: {x: {beds: 1, share: .nan}}", "`wards.x.share`: Input should be a finite number (got nan)"),
        ("name: a\nwards: {x: {beds: 1, share: .inf}}", "`wards.x.share`: "),
        ("name: a\nwards: {x: {beds: 1, share: -.inf}}", "`wards.x.share`: "),
        ("name: a\nwards: {x: {beds: 1, share: 1.0e+999}}", "`wards.x.share`: "),
        ("name: a\nwards: {x: {beds: 1, share: 0x" + "f" * 5000 + "}}", "`wards.x.share`: "),
        ("name: a\nwards: {3: {beds: 1}}", "`wards.3`: Input should be a valid string (got 3)"),
        ("name: a\nwards: [1]", "`wards`: "),
        ("name: no", "`name`: "),
        ("name: 3", "`name`: "),
        ("1: a", "`1`: Keys should be strings"),
        ("name: a\ninputs: {x: {kind: fixed, levels: [1, yes]}}", "`inputs.x.levels`: yes, no"),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path: Path, text: str, says: str) -> None:
    """A fault at any depth names the key as the file writes it, the value and the bound, or the nearest key."""
    assert says in refusal(write(tmp_path, text))


def test_every_fault_is_one_line_of_one_error(tmp_path: Path) -> None:
    """Several faults come together, one line each, each with the file's name."""
    path = write(tmp_path, "nam: a\nwards: {x: {beds: 0, share: 2}}")
    lines = refusal(path).splitlines()
    assert len(lines) == 4
    assert all(line.startswith(f"{path}: ") for line in lines)


def test_a_long_value_or_key_does_not_fill_the_screen(tmp_path: Path) -> None:
    """What is shown of a file stays short, and fit for every terminal."""
    message = refusal(write(tmp_path, f"name: a\n{'k' * 100_000}: 1\nwards: {{x: {{beds: {'v' * 100_000}}}}}"))
    assert len(message) < 1000
    assert "\\udc80" in refusal(write(tmp_path, '"\\udc80": 1\nname: a\n"\\udc80": 1'))


def test_a_file_over_the_size_limit_is_refused_unread(tmp_path: Path) -> None:
    """A huge file is refused by its size, before it is read."""
    path = tmp_path / "huge.yaml"
    with path.open("wb") as file:
        file.truncate(10**12)  # sparse: reading it would fail
    message = refusal(path)
    assert str(10**12) in message
    assert str(MAX_FILE_BYTES) in message


def test_a_path_that_is_no_readable_file_is_refused(tmp_path: Path) -> None:
    """A missing file and a folder are errors of configuration, not of the operating system."""
    assert "no such file" in refusal(tmp_path / "absent.yaml")
    assert "cannot be read" in refusal(tmp_path)


def test_the_file_is_named_even_if_its_name_begins_the_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file called `line` is named in front of an error that itself begins with the word line."""
    monkeypatch.chdir(tmp_path)
    assert refusal(write(tmp_path, "name: a\nname: b", name="line").relative_to(tmp_path)).startswith("line: line 2: ")


def test_plain_yaml_is_read_as_it_says(tmp_path: Path) -> None:
    """Comments, flow style, a byte order mark, ints for floats and 1e-1 without a dot are read."""
    path = write(
        tmp_path, "\ufeff# site\nname: a  # of the site\nwards: {x: {beds: 3, share: 1}, y: {beds: 2, share: 1e-1}}\n"
    )
    assert load(path, Hospital) == Hospital(
        name="a", wards={"x": Ward(beds=3, share=1.0), "y": Ward(beds=2, share=0.1)}
    )
    assert load(write(tmp_path, "name: a\nteaching: yes"), Hospital).teaching


def test_terms_are_frozen() -> None:
    """Nobody changes terms after they were checked."""
    with pytest.raises(ValidationError):
        Hospital(name="a").name = "b"


texts = st.text(st.characters(codec="utf-8"), max_size=40)
plain_data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "wards", "beds", "best", "history", "inputs", "share"]) | texts, inner
        )
    ),
    max_leaves=12,
)


@given(data=st.dictionaries(st.sampled_from(list(Hospital.model_fields)) | texts, plain_data))
@settings(deadline=None, max_examples=60)
def test_any_data_are_terms_or_one_error(data: dict[str, Any]) -> None:
    """Whatever a YAML file may contain, parsing gives terms or a ConfigurationError that can be printed."""
    try:
        parse(data, Hospital, "site.yaml")
    except ConfigurationError as error:
        assert str(error).encode().startswith(b"site.yaml: ")  # noqa: PT017 (either outcome is right)


SAMPLE = "name: a  # comment\nwards:\n  x: {beds: 3, share: 0.5}\nbest: {beds: 2}\nhistory: [{beds: 1}]\n"


@given(place=st.integers(0, len(SAMPLE)), cut=st.integers(0, 4), typed=st.binary(max_size=4))
@settings(deadline=None, max_examples=200)
def test_any_slip_of_the_hand_is_terms_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, place: int, cut: int, typed: bytes
) -> None:
    """A valid file with some bytes replaced by any others is read or refused, never a traceback."""
    plain = SAMPLE.encode()
    path = write(tmp_path_factory.getbasetemp(), plain[:place] + typed + plain[place + cut :], "slip.yaml")
    try:
        load(path, Hospital)
    except ConfigurationError as error:
        assert str(path) in str(error)  # noqa: PT017 (either outcome is right)


@given(data=plain_data)
@settings(deadline=None, max_examples=100)
def test_reading_agrees_with_the_safe_loader(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """What is not refused is read exactly as yaml.safe_load reads it."""
    text = yaml.safe_dump(data, allow_unicode=True)
    path = write(tmp_path_factory.getbasetemp(), text, "plain.yaml")
    assert repr(read_yaml(path)) == repr(yaml.safe_load(text))  # repr: NaN equals itself


@given(
    order=st.permutations(["name", "wards", "best", "history", "teaching"]), flow=st.sampled_from([True, False, None])
)
@settings(deadline=None, max_examples=30)
def test_layout_does_not_change_the_digest(order: list[str], flow: bool | None) -> None:
    """Order of keys, flow or block style, and defaults written out leave the digest as it is."""
    terms = Hospital(name="a", wards={"x": Ward(beds=3), "y": Ward(beds=4, share=1)}, best=Ward(beds=2))
    whole = terms.model_dump(mode="json")
    whole["wards"] = dict(reversed(list(whole["wards"].items())))
    text = yaml.safe_dump({key: whole[key] for key in order}, sort_keys=False, default_flow_style=flow)
    assert parse(yaml.safe_load(text), Hospital, "text").digest() == terms.digest()


def test_other_terms_have_another_digest() -> None:
    """Any value that differs changes the digest; it is a sha256 in hexadecimal digits."""
    digests = {
        Hospital(name="a").digest(),
        Hospital(name="b").digest(),
        Hospital(name="a", teaching=True).digest(),
        Hospital(name="a", best=Ward(beds=1)).digest(),
        Hospital(name="a", best=Ward(beds=1, share=0.25)).digest(),
        Hospital(name="a", history=(Ward(beds=1),)).digest(),
        Hospital(name="a", wards={"best": Ward(beds=1)}).digest(),
    }
    assert len(digests) == 7
    assert all(len(digest) == 64 and int(digest, 16) >= 0 for digest in digests)


class Grown(Ward):
    """A ward as a later version has it."""

    LATER: ClassVar[frozenset[str]] = frozenset({"nurses"})
    nurses: int | None = None


def test_a_later_term_counts_once_it_is_used() -> None:
    """What an earlier version pinned has the same digest while the new term is absent, and another with it."""
    assert Grown(beds=3).digest() == Grown(beds=3, nurses=None).digest() == Ward(beds=3).digest()
    assert Grown(beds=3, nurses=2).digest() not in {Ward(beds=3).digest(), Grown(beds=3, nurses=1).digest()}

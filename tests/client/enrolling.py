"""A hospital that may enrol, and the commands of `wardround client` run in this process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from client.commands import app
from client.site_file import SiteFile
from client.state import StateFolder
from common.errors import WardroundError
from common.study import Study
from tests.client.coordinator import Coordinator
from tests.client.hospitals import write_study


@dataclass
class Place:
    """A hospital that may enrol: its server admits its key."""

    folder: Path
    path: Path
    site: SiteFile
    state: StateFolder
    study: Study
    server: Coordinator

    def enrol(self, answer: str = "y\n") -> str:
        """Run the command; returns what it printed, or raises its error."""
        return command("enrol", str(self.path), answer=answer)

    def rewrite(self, **changes: Any) -> None:
        """Change keys of the site file; None takes one out."""
        keys = yaml.safe_load(self.path.read_text()) | changes
        self.path.write_text(yaml.safe_dump({key: value for key, value in keys.items() if value is not None}))

    def rewrite_study(self, **changes: Any) -> Study:
        """Change keys of this site's copy of the study."""
        return write_study(self.folder, **changes)


def command(*arguments: str, answer: str = "") -> str:
    """Run `wardround client ...` in this process; returns its output, or raises its error."""
    result = CliRunner().invoke(app, list(arguments), input=answer)
    if isinstance(result.exception, WardroundError):
        assert "\n" not in str(result.exception)
        raise result.exception
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return f"{result.output}\nstatus {result.exit_code}"

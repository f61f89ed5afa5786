"""The command line's front door: finds the room a command belongs to, imports only that, and hands over."""

from __future__ import annotations

import importlib
import sys
import traceback

ROOMS = {
    "simulate": ("simulations.commands", "federated simulations on this machine"),
    "server": ("server.commands", "run the coordinator of a study"),
    "client": ("client.commands", "take part as a hospital"),
}


def main() -> None:
    """Entry point of `wardround`: `wardround ROOM COMMAND ...`. Errors of ours are one line, exit status 2."""
    from common.errors import WardroundError

    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in ROOMS:
        wants_help = not arguments or arguments[0] in ("-h", "--help")
        if not wants_help:
            print(f"wardround: no command `{arguments[0]}`", file=sys.stderr)
        lines = [f"  wardround {room} --help    {what}" for room, (_, what) in ROOMS.items()]
        print("\n".join(["usage:", *lines]), file=sys.stdout if wants_help else sys.stderr)
        raise SystemExit(0 if wants_help else 2)
    room = arguments[0]
    try:
        importlib.import_module(ROOMS[room][0]).app(arguments[1:], prog_name=f"wardround {room}")
    except WardroundError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from None
    except Exception as error:  # a defect of ours; its text may hold a patient's value, its place does not
        frame = traceback.extract_tb(error.__traceback__)[-1]
        print(
            f"error: {type(error).__name__} at {frame.filename}:{frame.lineno}; this is a defect, report it",
            file=sys.stderr,
        )
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()

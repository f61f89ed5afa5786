"""The same study through Flower's own simulation engine (extra `ray`): for many machines, and as a cross-check.

The default grid (simulations/local_grid.py) needs no start-up and no Ray; this one runs the same Strategy and the
same ClientApp as Ray tasks. Flower deals a virtual node to any of its actors, so what a site must remember, its
ledger, travels in the node's Context. Node ids are random per call: the server asks each node for its site's name
before the first round, which a deployment never does (there, names come from keys).
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import time
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from client.app import build_app
from client.site import Site
from common.errors import ConfigurationError, WardroundError
from common.models.network import build_network
from common.training import state_of
from common.weights import Weights
from server.rounds import run
from server.strategy import FederatedAveraging
from simulations.hospitals import Hospitals

PATIENCE = 180.0  # seconds until all virtual sites have answered once; a crashed Ray must not be waited for forever
_opened: dict[str, Site] = {}  # of this actor, whose process serves one run: opening a site costs more than a round


def run_on_flower(hospitals: Hospitals, *, backend: dict[str, Any] | None = None) -> Weights:
    """Run the study on Flower's simulation engine and return the final weights.

    Args:
        hospitals: as for `simulations.experiment.simulate`; equal seeds give equal weights on either engine.
        backend: Flower's `backend_config`; default one CPU per virtual site.

    Raises:
        ConfigurationError: Ray is not installed (Flower would end the process).
        QuorumError: as in `server.rounds.run`.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigurationError("Flower's engine needs Ray: pip install 'wardround[ray]', or use the default engine")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing reaches outside
    from flwr.simulation import run_simulation

    names = sorted(hospitals.study.sites)
    found: list[Weights] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        roster = _ask_names(grid, len(names))
        start = state_of(build_network(hospitals.study, hospitals.seed))
        strategy = FederatedAveraging(hospitals.study, start, lambda: roster)
        found.append(run(grid, strategy, rounds=hospitals.study.training.rounds))

    run_simulation(
        server_app=server,
        client_app=_client_app(hospitals, names),
        num_supernodes=len(names),
        backend_config=backend or {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    return found[0]


def _client_app(hospitals: Hospitals, names: list[str]) -> ClientApp:
    app = ClientApp()

    def name_of(context: Context) -> str:
        return names[int(context.node_config["partition-id"])]

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(RecordDict({"site": ConfigRecord({"name": name_of(context)})}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _train(hospitals, name_of(context), message, context)

    return app


def _train(hospitals: Hospitals, name: str, message: Message, context: Context) -> Message:
    """One round at one site. Not a closure: Ray copies those with their globals, and `_opened` would stay empty."""
    if name not in _opened:
        _opened[name] = hospitals.open(name)
    site = _opened[name]
    if "ledger" in context.state:
        stored = context.state["ledger"]["bytes"]
        assert isinstance(stored, bytes)
        site.ledger = pickle.loads(stored)  # noqa: S301 (written below, never leaves this machine)
    reply = build_app(lambda _context: site)(message=message, context=context)
    context.state["ledger"] = ConfigRecord({"bytes": pickle.dumps(site.ledger)})
    return reply


def _ask_names(grid: Grid, count: int) -> dict[int, str]:
    """Node id -> site name, once all `count` virtual nodes have answered."""
    messages = [Message(RecordDict(), dst_node_id=n, message_type=MessageType.QUERY) for n in _all_nodes(grid, count)]
    replies = list(grid.send_and_receive(messages, timeout=PATIENCE))
    if len(replies) < count or any(reply.has_error() for reply in replies):
        raise WardroundError(f"not all {count} virtual sites answered in {PATIENCE:.0f} s; see Ray's log above")
    return {r.metadata.src_node_id: str(r.content["site"]["name"]) for r in replies}


def _all_nodes(grid: Grid, count: int) -> list[int]:
    """Flower starts the server first and registers its virtual nodes a moment later."""
    until = time.monotonic() + PATIENCE
    while len(nodes := list(grid.get_node_ids())) < count:
        if time.monotonic() > until:
            raise WardroundError(f"Flower registered {len(nodes)} of {count} virtual nodes in {PATIENCE:.0f} s")
        time.sleep(0.01)
    return nodes

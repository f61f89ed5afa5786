"""The study of `against_stock` as Flower's and Opacus's own examples would write it: run as a program of its own.

    python -m tests.benchmarks.stock DATA.npz --rounds 20

Flower's simulation engine on Ray with two CPUs, one per client; a ClientApp that builds a DPGRU, a data loader and a
PrivacyEngine in every round (flower/examples/opacus does the same), ten batches of 64 as one local epoch; FedAvg. It
is what this project is compared with, not a recommendation: an engine per round prints one round's epsilon.
"""

from __future__ import annotations

import argparse
import os
import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from opacus import PrivacyEngine
from opacus.layers import DPGRU
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BATCH, INPUTS, HIDDEN = 64, 76, 128


class Network(nn.Module):
    """A GRU over padded sequences, and a linear head on each one's last state."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrence = DPGRU(INPUTS, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        states = self.recurrence(x)[0]
        last = states.gather(1, (length - 1)[:, None, None].expand(-1, 1, HIDDEN))[:, 0]
        return self.head(last)[:, 0]


@lru_cache(maxsize=16)
def dataset(path: str, site: int) -> TensorDataset:
    """A site's padded records."""
    with np.load(path) as data:
        mine = data["site"] == site
        columns = (data["x"][mine], data["length"][mine].astype(np.int64), data["label"][mine].astype(np.float32))
    return TensorDataset(*(torch.from_numpy(column) for column in columns))


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sites", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sigma", type=float, default=1.0)
    arguments = parser.parse_args()
    path, sigma = str(arguments.data.absolute()), arguments.sigma
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from flwr.simulation import run_simulation

    client, server = ClientApp(), ServerApp()

    @client.train()
    def train(message: Message, context: Context) -> Message:
        warnings.simplefilter("ignore")  # Opacus's about its own hooks
        torch.set_num_threads(1)
        network = Network()
        network.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        records = dataset(path, int(context.node_config["partition-id"]))
        private, optimizer, loader = PrivacyEngine().make_private(
            module=network,
            optimizer=optimizer,
            data_loader=DataLoader(records, batch_size=BATCH),
            noise_multiplier=sigma,
            max_grad_norm=1.0,
        )
        loss = nn.BCEWithLogitsLoss()
        for x, length, label in loader:
            optimizer.zero_grad()
            value = loss(private(x, length), label)
            value.backward()
            optimizer.step()
        arrays = ArrayRecord(network.state_dict())
        return Message(
            RecordDict(
                {"arrays": arrays, "metrics": MetricRecord({"num-examples": len(records), "loss": float(value)})}
            ),
            reply_to=message,
        )

    @server.main()
    def run(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=arguments.sites)
        result = strategy.start(grid, ArrayRecord(Network().state_dict()), num_rounds=arguments.rounds)
        if len(result.train_metrics_clientapp) != arguments.rounds or not all(result.train_metrics_clientapp.values()):
            raise SystemExit("a round had no replies; see the actors' messages above")

    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=arguments.sites,
        backend_config={"init_args": {"num_cpus": 2}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )


if __name__ == "__main__":
    from tests.benchmarks.stock import main as imported  # Ray's actors find what this file defines by its own name

    imported()

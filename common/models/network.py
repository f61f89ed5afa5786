"""The diagnosis network: inputs -> recurrence -> pooling -> head, and its recurrence-free sibling.

A row's input is its dense features beside the sum of its code embeddings. The head sees some of: last state, mean of
states, mean of dense inputs, last dense input. The last two let the head be at least a logistic regression on the
record, which the state then refines; with a head that starts at zero that matters most when noise is large.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from common.batching import Batch
from common.models.recurrent import GRU, LSTM, RNN
from common.privacy.rows import Rows
from common.study import Model, Study

CELLS = {"gru": GRU, "lstm": LSTM, "rnn": RNN}


def build_network(study: Study, seed: int = 0) -> nn.Module:
    """The study's network with its public starting weights: a function of the study and `seed` alone."""
    terms, schema = study.model, study.features
    kind = LogisticRegression if terms.cell == "none" else DiagnosisNetwork
    with torch.random.fork_rng(devices=[]):
        # Starting weights are public; nothing private is drawn from this generator. torch.manual_seed would also reseed
        # the generators of every GPU, which fork_rng does not put back here.
        torch.default_generator.manual_seed(seed)
        return kind(terms, schema.n_dense, schema.n_codes, study.task.prevalence)


class DiagnosisNetwork(nn.Module):
    """Code embedding, one recurrent layer, pooling, linear head. Parameters are named as torch.nn names them.

    Args:
        terms: cell, widths, pooling, head start.
        n_dense: D, dense features of a row.
        n_codes: V, size of the public code list; 0 leaves the embedding out.
        prevalence: public share of positive labels; the head's bias starts at its logit.
    """

    def __init__(self, terms: Model, n_dense: int, n_codes: int, prevalence: float) -> None:
        super().__init__()
        self.pooling = terms.pooling
        width = n_dense + (terms.embedding if n_codes else 0)
        self.embedding = nn.EmbeddingBag(n_codes, terms.embedding, mode="sum") if n_codes else None
        self.recurrence = CELLS[terms.cell](width, terms.hidden)
        size = {name: terms.hidden if name.endswith("state") else n_dense for name in terms.pooling}
        self.head = nn.Linear(sum(size.values()), 1)
        self._start(terms, prevalence)

    @torch.no_grad()
    def _start(self, terms: Model, prevalence: float) -> None:
        """Starting weights that keep first gradients even: small embeddings, no gate bias but the LSTM's forget."""
        if self.embedding is not None:
            self.embedding.weight.mul_(0.7 / math.sqrt(terms.embedding))
        for name, parameter in self.recurrence.named_parameters():
            if name.startswith("bias"):
                parameter.zero_()
            if terms.cell == "lstm" and name.startswith("bias_ih"):
                parameter[terms.hidden : 2 * terms.hidden] = 1.0  # Jozefowicz et al. 2015: remember at first
        if terms.head_start == "zero":
            self.head.weight.zero_()
        self.head.bias.fill_(math.log(prevalence / (1 - prevalence)))

    def forward(self, batch: Batch) -> Tensor:
        """Logits [S] of the batch's sequences, in the batch's order."""
        if batch.n_sequences == 0:
            return batch.dense.new_zeros(0)
        x = batch.dense
        if self.embedding is not None:
            with Rows.of(PackedSequence(x, batch.sizes)):  # these rows are steps, not patients
                x = torch.cat([x, self.embedding(batch.codes, batch.code_start)], dim=1)
        states, _ = self.recurrence(PackedSequence(x, batch.sizes))
        logit: Tensor = self.head(_pool(self.pooling, batch, states.data)).squeeze(1)
        return logit


class LogisticRegression(nn.Module):
    """The line that a recurrence must beat: linear in pooled dense inputs and in the codes.

    A code adds one weight times its mean over the steps and one if it stands in the last step.
    """

    def __init__(self, terms: Model, n_dense: int, n_codes: int, prevalence: float) -> None:
        super().__init__()
        self.pooling = tuple(name for name in terms.pooling if name.endswith("input"))
        self.embedding = nn.EmbeddingBag(n_codes, 2, mode="sum") if n_codes else None
        self.head = nn.Linear(n_dense * len(self.pooling), 1)
        with torch.no_grad():
            if self.embedding is not None:
                self.embedding.weight.zero_()
            self.head.weight.zero_()
            self.head.bias.fill_(math.log(prevalence / (1 - prevalence)))

    def forward(self, batch: Batch) -> Tensor:
        """Logits [S] of the batch's sequences, in the batch's order."""
        if batch.n_sequences == 0:
            return batch.dense.new_zeros(0)
        logit: Tensor = self.head(_pool(self.pooling, batch, batch.dense)).squeeze(1)
        if self.embedding is not None:
            with Rows.of(PackedSequence(batch.dense, batch.sizes)):
                code = self.embedding(batch.codes, batch.code_start)
            logit = logit + _mean(batch, code[:, :1]).squeeze(1) + code[batch.last_row(), 1]
        return logit


def _mean(batch: Batch, rows: Tensor) -> Tensor:
    """Mean over each sequence's rows: [N, F] -> [S, F]."""
    total = rows.new_zeros(batch.n_sequences, rows.shape[1]).index_add(0, batch.sequence_of_row(), rows)
    return total / batch.length[:, None]


def _pool(pooling: tuple[str, ...], batch: Batch, states: Tensor) -> Tensor:
    """What the head sees, [S, F]: the named pieces side by side."""
    last = batch.last_row()
    pieces = {
        "last_state": lambda: states.index_select(0, last),
        "mean_state": lambda: _mean(batch, states),
        "mean_input": lambda: _mean(batch, batch.dense),
        "last_input": lambda: batch.dense.index_select(0, last),
    }
    return torch.cat([pieces[name]() for name in pooling], dim=1)

"""Long short-term memory (Hochreiter and Schmidhuber 1997; torch.nn.LSTM's variant, no peepholes)."""

from __future__ import annotations

import torch
from torch import Tensor

from common.models.cells.cell import Cell, add_product, backwards, put_product, reorder
from common.models.layout import Block


class LSTMCell(Cell):
    """The equations, for a state h, a cell state c and an input x.

        i, f, o = sigmoid(W x + b + W_h h + b_h)   each with its own weights
        u       = tanh(W x + b + W_h h + b_h)      torch calls it g
        c'      = f c + i u
        h'      = o tanh(c')

    Gate columns are u i f o: the three sigmoids are one operation, and so are the three gates that act
    through c'.
    """

    GATES = 4
    INPUT = HIDDEN = (0, 4)
    TORCH_INPUT = TORCH_HIDDEN = (1, 2, 0, 3)  # u i f o -> i f u o

    def prepare(self, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> None:
        """Both biases add up; the cell state gets a history of its own."""
        assert c0 is not None
        self.w_ih, self.w_hh, self.bias = (reorder(w, (2, 0, 1, 3)) for w in (w_ih, w_hh, b_ih + b_hh))
        self.memory = self.history(c0)  # [B + N, H]: initial cell states, then c after each packed row

    def last_memory(self) -> Tensor:
        """[B, H] the cell state after each sequence's last step."""
        if not self.layout.rows:
            return self.memory.clone()
        return self.memory[self.layout.sequences :].index_select(0, self.layout.last)

    def advance(self, block: Block) -> None:
        """The equations above, each gate already holding its input share."""
        before = self.layout.before(block.steps.start)
        h, c = self.states[before], self.memory[before]
        tanh_c = torch.empty_like(c)
        for u, i, f, o, ifo, gates, new_c, new_h in zip(
            self.steps(block, 0, 1),
            self.steps(block, 1, 2),
            self.steps(block, 2, 3),
            self.steps(block, 3, 4),
            self.steps(block, 1, 4),
            self.steps(block, 0, 4),
            torch.split(self.after(self.memory, block), block.sizes),
            torch.split(self.after(self.states, block), block.sizes),
            strict=True,
        ):
            h, c = h[: len(u)], c[: len(u)]  # sequences that still run
            add_product(gates, h, self.w_hh_t)
            ifo.sigmoid_()
            u.tanh_()
            c = torch.mul(f, c, out=new_c).addcmul_(i, u)
            h = torch.mul(o, torch.tanh(c, out=tanh_c[: len(c)]), out=new_h)

    def start_back(self, grad_memory: Tensor | None) -> None:
        """Takes dL/dc [B, H] of the last cell states, which a sequence meets at its own last step."""
        if grad_memory is None:
            grad_memory = self.memory.new_zeros(self.layout.sequences, self.hidden_size)
        # Two copies, used in turn: a step reads one and writes the other, and rows of sequences that end
        # earlier keep their initial value in both until their last step is reached.
        self.carried_c, self._spare_c = grad_memory.clone(), grad_memory.clone()

    def retreat(self, block: Block, slopes: Tensor, A: Tensor, grad: Tensor) -> None:
        """With d = dL/dh', e = dL/dc' and a the argument of each nonlinearity.

        e    = (what the later step sent back) + d o (1 - tanh(c')^2)
        da_o = d tanh(c') o (1 - o),  da_u = e i (1 - u^2),  da_i = e u i (1 - i),  da_f = e c f (1 - f),
        dc   = e f,  dh = W_h' (da_u, da_i, da_f, da_o)
        """
        H = self.hidden_size
        gates = self.gates[block.rows]
        u, i, f, o = torch.split(gates, H, dim=1)
        to_u, to_i, to_f, to_o = torch.split(slopes, H, dim=1)
        c, tanh_c = self.preceding(self.memory, block.rows), self.after(self.memory, block).tanh()
        ifo = gates[:, H:]
        torch.addcmul(ifo, ifo, ifo, value=-1, out=slopes[:, H:])
        to_i.mul_(u)
        to_f.mul_(c)
        to_o.mul_(tanh_c)
        torch.addcmul(i, i * u, u, value=-1, out=to_u)
        to_c = torch.addcmul(o, o, tanh_c.square_(), value=-1)

        for own, slope_uif, slope_o, slope_c, A_uif, A_o, A_t, f_t in backwards(
            block,
            grad,
            slopes[:, : 3 * H].view(-1, 3, H),
            to_o,
            to_c,
            A[:, : 3 * H].view(-1, 3, H),
            A[:, 3 * H :],
            A,
            f,
        ):
            d = self.arriving(own)
            e = self.carried_c[: len(d)].addcmul_(d, slope_c)
            torch.mul(e, f_t, out=self._spare_c[: len(d)])
            torch.mul(slope_o, d, out=A_o)
            torch.mul(slope_uif, e[:, None], out=A_uif)
            put_product(self.carried[: len(d)], A_t, self.w_hh)
            self.carried_c, self._spare_c = self._spare_c, self.carried_c

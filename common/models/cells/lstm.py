"""Long short-term memory (Hochreiter and Schmidhuber 1997; torch.nn.LSTM's variant, no peepholes)."""

from __future__ import annotations

import torch
from torch import Tensor

from common.models.cells.cell import Cell, reorder
from common.models.layout import Block


class LSTMCell(Cell):
    """The equations, for a state h, a cell state c and an input x.

        i, f, o = sigmoid(W_i x + b_i + W_h h + b_h)   each with its own W and b
        u       = tanh(the same)                       torch calls it g
        c'      = f c + i u
        h'      = o tanh(c')

    Gate columns are u i f o: the three sigmoids are one operation, and so are the three gates that act through c'.
    """

    GATES = 4
    INPUT = HIDDEN = (0, 4)
    TORCH_INPUT = TORCH_HIDDEN = (1, 2, 0, 3)  # u i f o -> i f u o

    def prepare(self, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> None:
        assert c0 is not None
        self.w_ih, self.w_hh, self.bias = (reorder(w, (2, 0, 1, 3)) for w in (w_ih, w_hh, b_ih + b_hh))
        self.memory = self.history(c0)  # [B + N, H]: initial cell states, then c after each packed row

    def last_memory(self) -> Tensor:
        """[B, H] the cell state after each sequence's last step."""
        if not self.layout.rows:
            return self.memory.clone()
        return self.memory[self.layout.sequences :].index_select(0, self.layout.last)

    def advance(self, block: Block) -> None:
        gates = self.gates[block.rows]

        def steps(first: int, last: int) -> tuple[Tensor, ...]:
            return self.columns(gates, (first, last)).split(block.sizes)

        before = self.layout.before(block.steps.start)
        h, c = self.states[before], self.memory[before]
        tanh_c = torch.empty_like(c)
        for all_gates, ifo, u, i, f, o, new_c, new_h in zip(
            steps(0, 4),
            steps(1, 4),
            steps(0, 1),
            steps(1, 2),
            steps(2, 3),
            steps(3, 4),
            self.after(self.memory, block).split(block.sizes),
            self.after(self.states, block).split(block.sizes),
            strict=True,
        ):
            h, c = h[: len(u)], c[: len(u)]  # sequences that still run
            all_gates.addmm_(h, self.w_hh_t)
            ifo.sigmoid_()
            u.tanh_()
            c = torch.mul(f, c, out=new_c).addcmul_(i, u)
            h = torch.mul(o, torch.tanh(c, out=tanh_c[: len(c)]), out=new_h)

    def start_back(self, grad_memory: Tensor | None) -> None:
        """dL/dc [B, H] of the last cell states, which a sequence meets at its own last step."""
        if grad_memory is None:
            grad_memory = self.memory.new_zeros(self.layout.sequences, self.hidden_size)
        # Two copies, used in turn: a step reads one and writes the other, and rows of sequences that ended
        # earlier keep their initial value in both until their last step is reached.
        self.carried_c, self._spare_c = grad_memory.clone(), grad_memory.clone()

    def retreat(self, block: Block, slopes: Tensor, out: Tensor, grad: Tensor) -> None:
        # Through c': dc'/du = i (1 - u^2), dc'/di = u i (1 - i), dc'/df = c f (1 - f), dc'/dc = f.
        # Through h': dh'/do = tanh(c') o (1 - o), dh'/dc' = o (1 - tanh(c')^2).
        H = self.hidden_size
        gates = self.gates[block.rows]
        u, i, f, o = gates.split(H, dim=1)
        to_u, to_i, to_f, to_o = slopes.split(H, dim=1)
        c, tanh_c = self.preceding(self.memory, block.rows), self.after(self.memory, block).tanh()
        ifo = gates[:, H:]
        torch.addcmul(ifo, ifo, ifo, value=-1, out=slopes[:, H:])
        to_i.mul_(u)
        to_f.mul_(c)
        to_o.mul_(tanh_c)
        torch.addcmul(i, i * u, u, value=-1, out=to_u)
        to_c = torch.addcmul(o, o, tanh_c.square_(), value=-1)

        def back(tensor: Tensor) -> tuple[Tensor, ...]:
            return tensor.split(block.sizes)[::-1]

        for own, slope_uif, slope_o, A_uif, A_o, A, slope_c, f_t in zip(
            back(grad),
            back(slopes[:, : 3 * H].view(-1, 3, H)),
            back(to_o),
            back(out[:, : 3 * H].view(-1, 3, H)),
            back(out[:, 3 * H :]),
            back(out),
            back(to_c),
            back(f),
            strict=True,
        ):
            d = self.arriving(own)
            size = len(d)
            dc = self.carried_c[:size].addcmul_(d, slope_c)
            torch.mul(dc, f_t, out=self._spare_c[:size])
            torch.mul(slope_o, d, out=A_o)
            torch.mul(slope_uif, dc[:, None], out=A_uif)
            torch.mm(A, self.w_hh, out=self.carried[:size])
            self.carried_c, self._spare_c = self._spare_c, self.carried_c

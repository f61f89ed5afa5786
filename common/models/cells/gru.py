"""Gated recurrent unit (Cho et al. 2014, arXiv 1406.1078; torch.nn.GRU's variant, bias inside the reset)."""

from __future__ import annotations

import torch
from torch import Tensor

from common.models.cells.cell import Cell, add_product, backwards, reorder
from common.models.layout import Block


class GRUCell(Cell):
    """The equations, for a state h and an input x.

        r  = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
        z  = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
        hn = W_hn h + b_hn
        n  = tanh(W_in x + b_in + r hn)
        h' = (1 - z) n + z h

    Gate columns are n r z | hn: the first three belong to w_ih, the last three to w_hh, so that both
    gradients share one buffer and the columns r z are multiplied once where norms need them twice.
    """

    GATES = 4
    INPUT = (0, 3)
    HIDDEN = (1, 4)
    TORCH_INPUT = (1, 2, 0)  # n r z -> r z n
    TORCH_HIDDEN = (0, 1, 2)  # r z hn is torch's order already

    def prepare(self, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> None:
        """The hidden bias of r and z joins the input's; that of hn cannot, it is multiplied by r."""
        del c0  # a GRU has no cell state
        H = self.hidden_size
        self.w_ih = reorder(w_ih, (2, 0, 1))
        self.w_hh = w_hh
        self.bias = torch.cat([b_ih[2 * H :], b_ih[: 2 * H] + b_hh[: 2 * H]])
        self.b_hn = b_hh[2 * H :]

    def advance(self, block: Block) -> None:
        """The equations above, each gate already holding its input share."""
        self.columns(self.gates[block.rows], (3, 4))[:] = self.b_hn
        h = self.states[self.layout.before(block.steps.start)]
        for n, r, z, hn, rz, hidden, new_h in zip(
            self.steps(block, 0, 1),
            self.steps(block, 1, 2),
            self.steps(block, 2, 3),
            self.steps(block, 3, 4),
            self.steps(block, 1, 3),
            self.steps(block, 1, 4),
            torch.split(self.after(self.states, block), block.sizes),
            strict=True,
        ):
            h = h[: len(n)]  # sequences that still run
            add_product(hidden, h, self.w_hh_t)
            rz.sigmoid_()
            n.addcmul_(r, hn).tanh_()
            h = torch.lerp(n, h, z, out=new_h)

    def retreat(self, block: Block, slopes: Tensor, A: Tensor, grad: Tensor) -> None:
        """With d = dL/dh' and a the argument of each nonlinearity.

        da_n = d (1 - z) (1 - n^2),  dhn = da_n r,  da_r = da_n hn r (1 - r),  da_z = d (h - n) z (1 - z),
        dh   = d z + W_h' (da_r, da_z, dhn)
        """
        H = self.hidden_size
        h = self.preceding(self.states, block.rows)
        n, r, z, hn = torch.split(self.gates[block.rows], H, dim=1)
        to_n, to_r, to_z, to_hn = torch.split(slopes, H, dim=1)
        not_z = 1 - z
        torch.addcmul(not_z, not_z, n * n, value=-1, out=to_n)
        torch.mul(to_n, r, out=to_hn)
        torch.sub(1, r, out=to_r).mul_(to_hn).mul_(hn)
        torch.sub(h, n, out=to_z).mul_(z).mul_(not_z)

        for own, slope, all_gates, hidden, z_t in backwards(
            block, grad, slopes.view(-1, 4, H), A.view(-1, 4, H), self.columns(A, self.HIDDEN), z
        ):
            d = self.arriving(own)
            dh = torch.mul(d, z_t, out=self.carried[: len(d)])
            torch.mul(slope, d[:, None], out=all_gates)
            add_product(dh, hidden, self.w_hh)

"""Plain recurrent network (Elman 1990; torch.nn.RNN), with tanh or ReLU."""

from __future__ import annotations

import torch
from torch import Tensor

from common.models.cells.cell import Cell, add_product, backwards, put_product
from common.models.layout import Block


class TanhCell(Cell):
    """h' = tanh(W_ih x + b_ih + W_hh h + b_hh)."""

    GATES = 1
    INPUT = HIDDEN = (0, 1)

    def activate(self, a: Tensor, out: Tensor) -> Tensor:
        """The nonlinearity."""
        return torch.tanh(a, out=out)

    def slope(self, h: Tensor, out: Tensor) -> None:
        """Its derivative, from its value."""
        torch.mul(h, h, out=out).neg_().add_(1)

    def prepare(self, c0: Tensor | None, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> None:
        """Both biases add up."""
        del c0  # a plain network has no cell state
        self.w_ih, self.w_hh, self.bias = w_ih, w_hh, b_ih + b_hh

    def advance(self, block: Block) -> None:
        """The equation above, the gate already holding its input share."""
        h = self.states[self.layout.before(block.steps.start)]
        for a, new_h in zip(
            self.steps(block, 0, 1), torch.split(self.after(self.states, block), block.sizes), strict=True
        ):
            h = h[: len(a)]  # sequences that still run
            add_product(a, h, self.w_hh_t)
            h = self.activate(a, out=new_h)

    def retreat(self, block: Block, slopes: Tensor, A: Tensor, grad: Tensor) -> None:
        """With d = dL/dh': da = d (1 - h'^2), or d where h' > 0; dh = W_hh' da."""
        self.slope(self.after(self.states, block), out=slopes)
        for own, slope, A_t in backwards(block, grad, slopes, A):
            d = self.arriving(own)
            torch.mul(slope, d, out=A_t)
            put_product(self.carried[: len(d)], A_t, self.w_hh)


class ReLUCell(TanhCell):
    """h' = max(0, W_ih x + b_ih + W_hh h + b_hh)."""

    def activate(self, a: Tensor, out: Tensor) -> Tensor:
        """The nonlinearity."""
        return torch.clamp(a, min=0, out=out)

    def slope(self, h: Tensor, out: Tensor) -> None:
        """Its derivative, from its value."""
        torch.gt(h, 0, out=out)

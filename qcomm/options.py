"""What a call was asked for, besides its tensors."""

from __future__ import annotations

import dataclasses

from qcomm import validate
from qcomm.formats import (
    FLOAT_SCALE_LAYOUTS,
    FP8_GROUP_SIZE,
    RECV_DTYPES,
    RECV_LAYOUTS,
    RecvDtype,
    RecvLayout,
    ScaleLayout,
    WireFormat,
)


@dataclasses.dataclass(frozen=True)
class DispatchOptions:
    """One dispatch's choices.

    `capacity` is the row count of a static receive, per expert if batched; `split` leaves the receive to a hook.
    """

    recv_layout: RecvLayout
    recv_dtype: RecvDtype
    alignment: int
    columnwise: bool
    static: bool
    capacity: int | None
    sf_layout: ScaleLayout
    wire: WireFormat
    seed: int
    async_op: bool
    split: bool = False

    def check(self) -> None:
        """Raise ValueError or TypeError that names the argument, where no backend could serve the call."""
        validate.seed(self.seed)
        for name, value in (("columnwise", self.columnwise), ("static", self.static), ("async_op", self.async_op)):
            validate.boolean(name, value)
        validate.one_of("recv_layout", self.recv_layout, RECV_LAYOUTS)
        validate.one_of("recv_dtype", self.recv_dtype, RECV_DTYPES)
        validate.positive("alignment", self.alignment)
        if not isinstance(self.sf_layout, ScaleLayout):
            raise TypeError(f"sf_layout must be a ScaleLayout, got {type(self.sf_layout).__name__}")
        validate.one_of("sf_layout", self.sf_layout, FLOAT_SCALE_LAYOUTS)
        if self.capacity is not None:
            if not self.static:
                raise ValueError(f"num_max_recv_tokens must be None unless static=True, got {self.capacity}")
            by_group = self.recv_layout != "token_major"
            validate.multiple("num_max_recv_tokens", self.capacity, self.alignment if by_group else 1)
        if self.columnwise:
            if self.recv_layout != "expert_major" or self.recv_dtype != "fp8":
                raise ValueError(
                    "columnwise needs recv_layout 'expert_major' and recv_dtype 'fp8', "
                    f"got {self.recv_layout!r} and {self.recv_dtype!r}"
                )
            if self.alignment % FP8_GROUP_SIZE:
                raise ValueError(
                    f"alignment must be a multiple of {FP8_GROUP_SIZE} for columnwise, got {self.alignment}"
                )


@dataclasses.dataclass(frozen=True)
class CombineOptions:
    """One combine's choices; `split` leaves the receive to a hook."""

    wire: WireFormat
    weighted: bool
    seed: int
    async_op: bool
    split: bool

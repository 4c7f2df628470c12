"""The text that train_moe.py trains on, of tools/gather_text.py, in batches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch


class Text:
    """Bytes to train on and held-out bytes, on the device.

    Args:
        path: OUT.bin of tools/gather_text.py; its manifest stands beside it.
        device: where batches are wanted.

    Raises:
        ValueError: the file is not the manifest's.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self.manifest = json.loads(path.with_suffix(".json").read_text())
        data = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
        if data.numel() != self.manifest["bytes"]:
            raise ValueError(f"{path} must have {self.manifest['bytes']} bytes, its manifest's, got {data.numel()}")
        start = self.manifest["held_out_start"]
        self.train, self.held_out = data[:start].to(device), data[start:].to(device)

    def batches(
        self, steps: int, batch: int, length: int, seed: int, rank: int, num_ranks: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield this rank's part of every step's sequences and what follows each byte, `[batch / num_ranks, length]`.

        The sequences of all ranks together depend on the seed only.
        """
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(self.train.numel() - length, (steps, batch), generator=generator)
        for mine in starts.to(self.train.device).chunk(num_ranks, dim=1)[rank]:
            yield _windows(self.train, mine, length)

    def held_out_batches(
        self, num_tokens: int, batch: int, length: int, rank: int, num_ranks: int
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return this rank's part of `num_tokens` held-out bytes, or as many whole batches as there are.

        Sequences do not overlap, and are spread over the whole part.

        Raises:
            ValueError: the held-out part has no whole batch.
        """
        whole = (self.held_out.numel() - 1) // length
        count = min(num_tokens // length, whole) // batch * batch
        if count == 0:
            raise ValueError(
                f"held-out text must have at least {batch * length + 1} bytes, got {self.held_out.numel()}"
            )
        starts = (torch.arange(count) * whole // count * length).to(self.held_out.device)
        return [
            _windows(self.held_out, some.chunk(num_ranks)[rank], length) for some in starts.view(-1, batch).unbind()
        ]


def _windows(data: torch.Tensor, starts: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    index = starts[:, None] + torch.arange(length + 1, device=starts.device)
    window = data[index].long()
    return window[:, :-1], window[:, 1:]

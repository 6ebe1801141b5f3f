"""A ``.safetensors`` file that is written tensor by tensor, so that one of them is in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import BinaryIO

import torch
from torch import Tensor

_FLOAT32 = 4  # bytes


class WeightsWriter:
    """Writes float32 tensors in any order, byte for byte as safetensors itself writes them.

    The format, by safetensors' documentation: length of the header, 8 bytes little-endian; the
    header, JSON; the tensors' bytes. The header says where each one lies, so it comes first.

    Args:
        file: Empty, open for writing.
        shapes: Of every tensor, by its name.
    """

    def __init__(self, file: BinaryIO, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._file, self._offsets = file, dict[str, int]()
        header, end = {}, 0
        for name in sorted(shapes):
            self._offsets[name], end = end, end + _FLOAT32 * math.prod(shapes[name])
            offsets = [self._offsets[name], end]
            header[name] = {"dtype": "F32", "shape": shapes[name], "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        self._start = file.tell()
        file.truncate(self._start + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a float32 tensor of the CPU, of the shape that was announced, in its place."""
        self._file.seek(self._start + self._offsets[name])
        self._file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)

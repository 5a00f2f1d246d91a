"""Reads parts of tensors in safetensors files through the library's mapping; writes tensors one by one.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the header's length, a JSON header, then
the tensors' bytes. The writer is ours because the library's needs every tensor in memory at once.
"""

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES as DTYPES

from errors import UserError

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK_BYTES = 2**22  # what is written is still in the core's cache when it is hashed


class TensorFileError(UserError):
    """A file that is not a whole safetensors file."""


@dataclass(frozen=True)
class Box:
    """A part of a tensor: its first index in each dim, and its shape."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Iterable[int]) -> "Box":
        shape = tuple(shape)
        return cls((0,) * len(shape), shape)

    def overlap(self, other: "Box") -> "Box | None":
        starts = tuple(map(max, self.offsets, other.offsets))
        dims = zip(self.offsets, self.shape, other.offsets, other.shape, starts, strict=True)
        shape = tuple(min(a + n, b + m) - start for a, n, b, m, start in dims)
        return Box(starts, shape) if all(n > 0 for n in shape) else None

    def inside(self, outer: "Box") -> tuple[slice, ...]:
        """Where this box lies in a tensor that holds `outer`."""
        dims = zip(self.offsets, self.shape, outer.offsets, strict=True)
        return tuple(slice(a - start, a - start + n) for a, n, start in dims)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class TensorFileReader:
    """A safetensors file, mapped into memory: reading a part touches no more than that part.

    `tensors`: name -> (dtype, shape). Raises TensorFileError if the file is not whole.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = safe_open(path, "pt")
            self.metadata: dict[str, str] = self._file.metadata() or {}
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}
            self.tensors = {name: (DTYPES[s.get_dtype()], tuple(s.get_shape())) for name, s in slices.items()}
        except (SafetensorError, OSError, KeyError) as error:
            raise TensorFileError(
                f"{path} is not a whole safetensors file: {error}", "Download or save it again"
            ) from None

    def read(self, name: str, part: tuple[slice, ...] = ()) -> torch.Tensor:
        """The tensor or a part, on the CPU. It shares the file's mapping: copy it to keep or change it."""
        return self._file.get_slice(name)[part] if part else self._file.get_tensor(name)

    def tensor_digest(self, name: str) -> str:
        return tensor_digest(self.read(name))


def tensor_digest(tensor: torch.Tensor) -> str:
    """The checksum of the tensor's bytes."""
    return xxhash.xxh3_128_hexdigest(tensor_bytes(tensor))


def file_digest(path: Path) -> str:
    """The checksum of the whole file, read in chunks."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while content := file.read(CHUNK_BYTES):
            digest.update(content)
    return digest.hexdigest()


class TensorFileWriter:
    """Writes one safetensors file, tensor by tensor in the order of `specs`: name -> (dtype, shape)."""

    def __init__(self, path: Path, specs: dict[str, tuple[torch.dtype, tuple]], metadata: dict[str, str]):
        self._path, self._specs, self._metadata = path, specs, metadata
        self._remaining, self._hash, self._size = iter(specs), xxhash.xxh3_128(), 0
        self._file = open(path, "wb", buffering=0)
        self._write(memoryview(self._header()))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def _header(self) -> bytes:
        entries, offset = {"__metadata__": {"format": "pt", **self._metadata}}, 0
        for name, (dtype, shape) in self._specs.items():
            end = offset + math.prod(shape) * dtype.itemsize
            entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        encoded = json.dumps(entries, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        return struct.pack("<Q", len(encoded)) + encoded

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Adds the next tensor, from any device. An OSError carries the file's name."""
        assert name == next(self._remaining), name
        assert self._specs[name] == (tensor.dtype, tuple(tensor.shape)), name
        self._write(tensor_bytes(tensor))

    def _write(self, data: memoryview) -> None:
        while data:
            try:
                count = self._file.write(data[:CHUNK_BYTES])
            except OSError as error:
                error.filename = str(self._path)
                raise
            self._hash.update(data[:count])
            data = data[count:]
            self._size += count

    def replace_metadata(self, metadata: dict[str, str]) -> None:
        """Rewrites the header with metadata of the same length. The file's checksum no longer holds."""
        before, self._metadata = len(self._header()), metadata
        written = os.pwrite(self._file.fileno(), self._header(), 0)
        assert written == before

    def finish(self) -> dict:
        """Flushes everything to disk; returns the file's size and checksum."""
        assert next(self._remaining, None) is None, "every tensor of the specs is added"
        os.fsync(self._file.fileno())
        self._file.close()
        return {"size": self._size, "xxh3_128": self._hash.hexdigest()}


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes; copied only if the tensor is not on the CPU or not contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")

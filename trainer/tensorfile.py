"""safetensors files read and written one tensor, or a box of one, at a time, without mapping them into memory.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the header's length, a JSON header, then the tensors' bytes. The
library's own reader maps the whole file, and its writer wants every tensor at once; both would make memory grow with the model.
"""

import contextlib
import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100 * 2**20  # the format's own limit
CHUNK_BYTES = 2**22  # read, hashed and written at a time: about what a core's cache holds
WRITEBACK_BYTES = 2**26


class TensorFileError(ValueError):
    """A file that is not a whole safetensors file; the message names it."""


@dataclass(frozen=True)
class Box:
    """A part of a tensor: where it starts in each dim, and its shape."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Iterable[int]) -> "Box":
        shape = tuple(shape)
        return cls((0,) * len(shape), shape)

    def overlap(self, other: "Box") -> "Box | None":
        starts = tuple(map(max, self.offsets, other.offsets))
        stops = tuple(
            min(a + n, b + m)
            for a, n, b, m in zip(self.offsets, self.shape, other.offsets, other.shape, strict=True)
        )
        shape = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
        return Box(starts, shape) if all(n > 0 for n in shape) else None

    def inside(self, outer: "Box") -> "Box":
        """The same part, counted from the start of `outer`."""
        return Box(tuple(a - b for a, b in zip(self.offsets, outer.offsets, strict=True)), self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(a, a + n) for a, n in zip(self.offsets, self.shape, strict=True))


class TensorFileReader:
    """The header of a safetensors file, read once; `read` opens the file, and holds no more than what it returns.

    After `start_digest`, what is read from front to back is hashed on the way: `file_digest` then needs no second pass.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                (length,) = struct.unpack("<Q", file.read(8))
                if length > min(size, MAX_HEADER_BYTES):
                    raise ValueError("its header is cut off")
                encoded = file.read(length)
                header = json.loads(encoded)
            self.metadata = header.pop("__metadata__", {})
            self._data_start, self._size = 8 + length, size
            self._front, self._digest, self._hashed = struct.pack("<Q", length) + encoded, None, 0
            self.tensors = {
                name: (DTYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in header.items()
            }
            self._starts = {name: entry["data_offsets"][0] for name, entry in header.items()}
            for name, (dtype, shape) in self.tensors.items():
                begin, end = header[name]["data_offsets"]
                if (
                    begin < 0
                    or end - begin != math.prod(shape) * dtype.itemsize
                    or self._data_start + end > size
                ):
                    raise ValueError(f"tensor {name} does not lie inside it")
        except FileNotFoundError:
            raise TensorFileError(f"{path} is missing") from None
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise TensorFileError(f"{path} is not a whole safetensors file: {error}") from None

    def read(self, name: str, box: Box | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor, or a box of it, on the CPU; put into `out` if given."""
        dtype, shape = self.tensors[name]
        box = box or Box.whole(shape)
        result = torch.empty(box.shape, dtype=dtype) if out is None else out
        row_shape = shape[1:]
        if box.shape[1:] == row_shape and result.is_contiguous():  # whole rows: one run of bytes
            first_row = box.offsets[0] if shape else 0
            self._read_into(result, self._starts[name] + first_row * math.prod(row_shape) * dtype.itemsize)
        else:
            for row in range(box.shape[0]):
                whole = self.read(name, Box((box.offsets[0] + row,) + (0,) * len(row_shape), (1, *row_shape)))
                result[row] = whole[0][Box(box.offsets[1:], box.shape[1:]).slices]
        return result

    def _read_into(self, tensor: torch.Tensor, offset: int) -> None:
        if not tensor.numel():
            return
        view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._data_start + offset)
            while view:
                count = file.readinto(view[:CHUNK_BYTES])
                if not count:
                    raise TensorFileError(f"{self.path} is cut off")
                if self._digest is not None and offset == self._hashed:
                    self._digest.update(view[:count])
                    self._hashed += count
                offset += count
                view = view[count:]

    def tensor_digest(self, name: str) -> str:
        """The checksum of a tensor's bytes, read in chunks."""
        dtype, shape = self.tensors[name]
        return _digest(self.path, self._data_start + self._starts[name], math.prod(shape) * dtype.itemsize)

    def start_digest(self) -> None:
        self._digest, self._hashed = xxhash.xxh3_128(self._front), 0

    def file_digest(self) -> str:
        """The checksum of the whole file."""
        if self._digest is not None and self._data_start + self._hashed == self._size:
            return self._digest.hexdigest()
        return _digest(self.path, 0, self._size)


class TensorFileWriter:
    """Writes one safetensors file tensor by tensor, in the order of `specs`: name -> (dtype, shape).

    checksums: of the whole "file" (finish returns it), of each of the "tensors" (left in `digests`), or None.
    """

    def __init__(
        self,
        path: Path,
        specs: dict[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: dict[str, str],
        checksums: str | None = None,
    ):
        header, offset = {"__metadata__": {"format": "pt", **metadata}}, 0
        for name, (dtype, shape) in specs.items():
            size = math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self.size = 8 + len(encoded) + offset
        self.digests: dict[str, str] = {}
        self._header, self._specs = encoded, specs
        self._checksums, self._hash = checksums, xxhash.xxh3_128()
        self._remaining = iter(specs)
        self._path, self._file = path, open(path, "wb", buffering=0)
        self._written = self._flushing = 0
        self._put(struct.pack("<Q", len(encoded)) + encoded)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def _put(self, data) -> None:
        view = memoryview(data)
        while view:
            try:
                written = self._file.write(view[:CHUNK_BYTES])
            except OSError as error:
                error.filename = str(self._path)
                raise
            if self._checksums:
                self._hash.update(view[:written])
            view = view[written:]
            self._written += written
            if self._written - self._flushing >= WRITEBACK_BYTES and hasattr(os, "posix_fadvise"):
                # The disk begins now what fsync would otherwise wait for at the end: Linux starts to write what it is told to forget.
                with contextlib.suppress(OSError):  # a hint, which some file systems do not take
                    os.posix_fadvise(
                        self._file.fileno(),
                        self._flushing,
                        self._written - self._flushing,
                        os.POSIX_FADV_DONTNEED,
                    )
                self._flushing = self._written

    def add(self, name: str, tensor: torch.Tensor) -> None:
        assert self._specs[name] == (tensor.dtype, tuple(tensor.shape)), name
        self.add_in_parts(name, [tensor])

    def add_in_parts(self, name: str, parts: Iterable[torch.Tensor]) -> None:
        """Adds a tensor that comes in runs of its rows, one after the other."""
        assert name == next(self._remaining), name
        dtype, shape = self._specs[name]
        end = self._written + math.prod(shape) * dtype.itemsize
        if self._checksums == "tensors":
            self._hash = xxhash.xxh3_128()
        for part in parts:
            self._put(tensor_bytes(part))
        assert self._written == end, name
        if self._checksums == "tensors":
            self.digests[name] = self._hash.hexdigest()

    def replace_in_header(self, old: str, new: str) -> None:
        """Puts in what was not known at the start, over a placeholder of the same length."""
        header = self._header.replace(old.encode(), new.encode())
        assert len(header) == len(self._header) and header != self._header
        os.pwrite(self._file.fileno(), header, 8)

    def finish(self) -> dict:
        """Flushes everything to disk; returns the file's size and checksum."""
        assert next(self._remaining, None) is None, "every tensor of the specs is added"
        os.fsync(self._file.fileno())
        self._file.close()
        return {"size": self.size, "xxh3_128": self._hash.hexdigest()}


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes, copied only where it is not on the CPU or not contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def _digest(path: Path, start: int, size: int) -> str:
    """The checksum of `size` bytes of the file, read in chunks."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(CHUNK_BYTES))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while size and (count := file.readinto(buffer[: min(size, CHUNK_BYTES)])):
            digest.update(buffer[:count])
            size -= count
    return digest.hexdigest()

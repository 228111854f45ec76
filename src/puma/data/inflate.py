"""Reading a zip member front to back in constant memory, whether it is stored or deflated."""

from __future__ import annotations

import zlib
from copy import copy
from typing import BinaryIO

from puma.data.archive import Member
from puma.errors import DataError

_CHUNK = 1 << 14  # a clone keeps what is left of it


class MemberReader:
    """The unfolded bytes of a member, from its first byte on; never more than the archive claims, never fewer.

    Only what the caller asks for is inflated, so a bomb costs no more memory than the request. Where the end is
    reached, the CRC-32 has been compared.
    """

    def __init__(self, member: Member) -> None:
        self.member = member
        self.position = 0
        self._file: BinaryIO = member.path.open("rb")
        self._consumed = 0
        self._inflate = zlib.decompressobj(-zlib.MAX_WBITS) if member.compressed else None
        self._pending = b""
        self._crc = 0

    def __enter__(self) -> MemberReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def clone(self) -> MemberReader:
        """A reader at the same position that goes its own way; at most 60 kB. One of them at a time may read."""
        other = copy(self)
        if self._inflate is not None:
            other._inflate = self._inflate.copy()
            other._consumed -= len(self._pending)  # read again rather than held
            other._pending = b""
        return other

    def read(self, count: int, /) -> bytes:
        """The next ``count`` bytes; fewer only at the end that the archive announced.

        Raises:
            DataError: the bytes end early, go on beyond the announced size, cannot be inflated, or have another CRC-32.
        """
        count = min(count, self.member.size - self.position)
        blocks: list[bytes] = []
        missing = count
        while missing:
            block = self._next(missing)
            if not block:
                raise self._broken(f"{missing:,} of {self.member.size:,} bytes are missing")
            blocks.append(block)
            missing -= len(block)
        data = blocks[0] if len(blocks) == 1 else b"".join(blocks)
        self.position += len(data)
        self._crc = zlib.crc32(data, self._crc)
        if self.position == self.member.size and count:
            self._check_end()
        return data

    def _next(self, limit: int) -> bytes:
        if self._inflate is None:
            return self._raw(limit)
        try:
            while not self._inflate.eof:
                if not self._pending:
                    self._pending = self._raw(_CHUNK)
                source = self._pending
                block = self._inflate.decompress(source, limit)
                self._pending = self._inflate.unconsumed_tail
                if block or not source:
                    return block
        except zlib.error as error:
            raise self._broken(str(error)) from None
        return b""

    def _raw(self, limit: int) -> bytes:
        self._file.seek(self.member.offset + self._consumed)  # clones share the file
        block = self._file.read(min(limit, self.member.stored_size - self._consumed))
        self._consumed += len(block)
        return block

    def _check_end(self) -> None:
        if self._crc != self.member.crc:
            raise self._broken(f"CRC-32 is {self._crc:08x}, the archive says {self.member.crc:08x}")
        if self._inflate is not None and not self._inflate.eof and self._next(1):
            raise self._broken(f"it goes on beyond the {self.member.size:,} bytes that the archive announces")

    def _broken(self, why: str) -> DataError:
        return DataError(
            f"{self.member.path}: member {self.member.name!r} is damaged",
            why=why,
            fix="copy or download the file again",
        )

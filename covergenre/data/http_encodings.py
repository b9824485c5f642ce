"""Decodes the Content-Encoding of HTTP responses, up to a size limit."""

import zlib
from collections.abc import Callable

from covergenre.data.image_decoding import CoverError

_NO_ENCODING = frozenset({"", "identity", "none", "binary", "utf-8", "aws-chunked"})
"""Values that mean no encoding: none, and those that servers send by mistake (S3 keeps aws-chunked,
the encoding of the upload)."""


def decoded(data: bytes, content_encoding: str, limit: int) -> bytes:
    """`data` without its content encodings, at most `limit` bytes. Raises CoverError.

    Servers may apply encodings that were not requested. Decoding stops at the limit, so that a
    small body cannot expand without bound.
    """
    for encoding in reversed([name.strip() for name in content_encoding.lower().split(",")]):
        if encoding in _NO_ENCODING or not data:
            continue
        if encoding not in _DECODERS:
            raise CoverError("unreadable_file", f"unknown Content-Encoding {encoding[:40]!r}")
        try:
            data = _DECODERS[encoding](data, limit)
        except (EOFError, zlib.error) as error:
            raise CoverError(
                "unreadable_file", f"the body is not valid {encoding}, its Content-Encoding"
            ) from error
    return data


# Decoders raise EOFError or zlib.error if the data is not in their encoding, and CoverError if the
# result is longer than `limit`.


def _gunzip(data: bytes, limit: int) -> bytes:
    found = bytearray()
    while True:  # a file may have several members, and trailing garbage
        member = zlib.decompressobj(wbits=31)
        found += member.decompress(data, limit + 1 - len(found))
        _check_ended(len(found), limit, member.eof)
        data = member.unused_data
        if not data.startswith(b"\x1f\x8b"):
            return bytes(found)


def _inflate(data: bytes, limit: int) -> bytes:
    def inflate(wbits: int) -> bytes:
        stream = zlib.decompressobj(wbits)
        found = stream.decompress(data, limit + 1)
        _check_ended(len(found), limit, stream.eof)
        return found

    try:
        return inflate(zlib.MAX_WBITS)
    except zlib.error:  # some servers leave out the zlib header
        return inflate(-zlib.MAX_WBITS)


def _unbrotli(data: bytes, limit: int) -> bytes:
    import brotli

    stream = brotli.Decompressor()
    try:
        found = bytearray(stream.process(data, output_buffer_limit=limit + 1))
        while len(found) <= limit and not stream.can_accept_more_data():
            found += stream.process(b"", output_buffer_limit=limit + 1)
    except brotli.error as error:
        raise EOFError from error
    _check_ended(len(found), limit, stream.is_finished())
    return bytes(found)


def _unzstd(data: bytes, limit: int) -> bytes:
    from backports import zstd

    found = bytearray()
    while data:  # a file may have several frames
        frame = zstd.ZstdDecompressor()
        try:
            found += frame.decompress(data, limit + 1 - len(found))
        except zstd.ZstdError as error:
            raise EOFError from error
        _check_ended(len(found), limit, frame.eof)
        data = frame.unused_data
    return bytes(found)


def _check_ended(length: int, limit: int, ended: bool) -> None:
    if length > limit:
        raise CoverError("file_too_large", f"over {limit:,} bytes")
    if not ended:
        raise EOFError


_DECODERS: dict[str, Callable[[bytes, int], bytes]] = {
    "gzip": _gunzip,
    "x-gzip": _gunzip,
    "deflate": _inflate,
    "br": _unbrotli,
    "zstd": _unzstd,
}

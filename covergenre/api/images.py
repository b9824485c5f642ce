"""Covers of any type -> the pixels that the pipeline computes; for predict and transforms."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from covergenre.data import covers, decoder_process, image_decoding
from covergenre.data.covers import Source
from covergenre.data.image_decoding import CoverError, Preprocessing
from covergenre.errors import ImageError
from covergenre.models.predictor import normalise, to_unit

if TYPE_CHECKING:
    import torch

Cover: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[np.uint8]
)
"""A cover: a path or URL (local, s3://, http(s)://, data:), encoded bytes, a PIL image, or pixels
as uint8 [height, width], [height, width, 3] (RGB) or [height, width, 4] (RGBA)."""

_FETCHES = 16
"""Covers that are fetched at a time."""


class Transform:
    """A cover -> the input of a network, with the preprocessing of its model. Picklable."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing

    def __call__(self, cover: Cover) -> "torch.Tensor":
        """A PIL image, or any other cover, as a normalized float32 tensor [3, side, side].

        The pixels are those that the pipeline computes from the same bytes, with one exception: a
        large JPEG (over 896 pixels for a side of 224) whose PIL image is already decoded may differ
        by a few levels, because the pipeline decodes it at a reduced size.

        Raises ImageError if the cover cannot be read or decoded.
        """
        try:
            image = decode(cover, self.preprocessing, Source(), isolated=False)
        except CoverError as error:
            raise ImageError(f"{name_of(cover)}: {error}", code=error.reason) from error
        return normalise(to_unit(image[None], "cpu"), self.preprocessing)[0]

    def __repr__(self) -> str:
        spec = self.preprocessing
        return f"Transform(side={spec.side}, mean={spec.mean}, std={spec.std})"


def decode(cover: Any, spec: Preprocessing, source: Source, *, isolated: bool) -> NDArray[np.uint8]:
    """Pixels of a cover, uint8 [side, side, 3]. Raises CoverError.

    isolated: decode encoded bytes in the decoder process, for covers from outside.
    """
    cover = _as_encoded(cover)
    if isinstance(cover, str):
        cover = covers.fetch(cover, source).data
    if isinstance(cover, bytes):
        return (decoder_process.decode if isolated else image_decoding.decode)(cover, spec)
    return image_decoding.decode_image(cover, spec)


def decode_batches(
    covers: Iterable[Any], spec: Preprocessing, source: Source, batch_size: int
) -> Iterator[list[tuple[str, NDArray[np.uint8] | CoverError]]]:
    """Batches of (name, pixels or error), in the order of `covers`.

    The next batch is fetched and decoded while the caller processes the current one.
    """
    pool = ThreadPoolExecutor(_FETCHES)
    ahead: deque[tuple[str, Future[NDArray[np.uint8]]]] = deque()
    numbered = enumerate(covers)
    try:
        while True:
            while len(ahead) < 2 * batch_size and (item := next(numbered, None)) is not None:
                index, cover = item
                future: Future[NDArray[np.uint8]] = Future()
                try:
                    # Read open files on this thread: the same one may be in the list twice.
                    encoded = _as_encoded(cover)
                    future = pool.submit(decode, encoded, spec, source, isolated=True)
                except CoverError as error:
                    future.set_exception(error)
                ahead.append((name_of(cover, index), future))
            if not ahead:
                return
            batch = [ahead.popleft() for _ in range(min(batch_size, len(ahead)))]
            yield [(name, _result(future)) for name, future in batch]
    finally:
        pool.shutdown(cancel_futures=True)


def _result(future: Future[NDArray[np.uint8]]) -> NDArray[np.uint8] | CoverError:
    try:
        return future.result()
    except CoverError as error:
        return error


def as_list(covers: Any) -> tuple[int | None, Iterable[Any]]:
    """(number of covers, if known; the covers), for one cover or several."""
    encoded = bytes | bytearray | memoryview
    is_one = isinstance(covers, str | os.PathLike | encoded | Image.Image) or (
        isinstance(covers, np.ndarray) and covers.dtype != object and covers.ndim in (2, 3)
    )
    if is_one:
        return 1, [covers]
    return (len(covers) if hasattr(covers, "__len__") else None), covers


def name_of(cover: Any, index: int | None = None) -> str:
    """The path or URL of a cover, or its type and index."""
    if isinstance(cover, Image.Image):
        cover = getattr(cover, "filename", "") or cover
    if isinstance(cover, str | os.PathLike):
        return os.fspath(cover)
    return f"<{type(cover).__name__}>" if index is None else f"<{type(cover).__name__} {index}>"


def _as_encoded(cover: Any) -> str | bytes | Image.Image:
    """`cover` as a path, encoded bytes, or a PIL image in memory. Raises CoverError."""
    match cover:
        case Image.Image():
            return _undecoded_bytes(cover) or cover
        case str() | os.PathLike():
            return os.fspath(cover)
        case bytes() | bytearray() | memoryview():
            return bytes(cover)
        case np.ndarray() if _is_image(cover):
            return Image.fromarray(cover.squeeze(2) if cover.shape[2:] == (1,) else cover)
    if cover is None:
        raise CoverError("no_cover")
    what = type(cover).__name__
    if isinstance(cover, np.ndarray):
        what = f"array of {cover.dtype} {list(cover.shape)}"
    raise CoverError(
        "not_an_image",
        f"{what}; give a path, URL, bytes, PIL image or uint8 array [height, width, 3]",
    )


def _is_image(array: NDArray[Any]) -> bool:
    channels = array.shape[2:] in ((), (1,), (3,), (4,))
    return array.dtype == np.uint8 and array.ndim in (2, 3) and channels and array.size > 0


def _undecoded_bytes(image: Image.Image) -> bytes | None:
    """The bytes of an image that Pillow has opened but not decoded, to decode them as the pipeline
    does."""
    if not isinstance(image, ImageFile.ImageFile) or not image.tile or image.fp is None:
        return None
    if image.tell():  # not the first frame
        return None
    position = image.fp.tell()
    image.fp.seek(0)
    data = image.fp.read()
    image.fp.seek(position)
    return data

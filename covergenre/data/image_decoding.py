"""Decodes covers: encoded bytes -> RGB uint8 pixels, or the reason for rejection.

Training, evaluation and scoring all use `decode` with the preprocessing that is saved with the
model, so that a model gets the same pixels as in training. Needs only Pillow and numpy.
"""

import hashlib
import io
import warnings
from dataclasses import asdict, dataclass, fields
from functools import cache, lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from covergenre.data.image_repair import repaired, without_stray_bytes
from covergenre.data.jpeg_repair import repaired_jpeg
from covergenre.errors import ModelError

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Supported formats: those that Pillow decodes itself. For EPS it would run Ghostscript."""

MAX_BYTES = 25_000_000
"""Larger files are rejected; a cover must fit into a row group of the dataset."""

MAX_PIXELS = 100_000_000
"""Covers with more pixels are rejected as possible decompression bombs."""

_JPEG_QUALITY = 92  # visually lossless at cover size; 4:4:4 below keeps colored lettering sharp
# EXIF orientation -> transposition to upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_HIGH_BIT_DEPTH = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")  # gray with more than 8 bits
_SRGB_TOLERANCE = 3  # of 255; profiles that differ less from sRGB are ignored
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class CoverError(Exception):
    """A cover is rejected. `reason` is a key of schema.REASONS. It never ends a job."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[Any, ...]:  # keeps both arguments when pickled
        return CoverError, (self.reason, self.detail)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The steps from encoded bytes to normalized pixels. Changing a step requires a new version."""

    version: int = 1
    side: int = 224
    """Pixels. Covers are resized to side x side; the aspect ratio is not kept, as in the paper."""
    orientation: str = "exif"
    """EXIF orientation is applied before anything else."""
    alpha: str = "white"
    """Transparent pixels are composited over this color."""
    reduction: str = "dct-2x"
    """JPEGs are decoded at the smallest DCT scale of at least twice `side`: much faster."""
    filter: str = "bilinear"
    """Antialiased resampling filter."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per channel, in 0 to 1, as for torchvision's ImageNet weights; applied on the device."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def to_json(self) -> dict[str, Any]:
        """As saved in preprocessing.json of the model directory."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Preprocessing":
        """Raises ModelError if this version of covergenre does not support one of the steps."""
        known = {f.name for f in fields(cls)}
        if set(values) != known:
            raise ModelError(
                f"preprocessing: expected {sorted(known)}, found {sorted(values)}",
                code="preprocessing_fields",
            )
        arguments: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        spec = cls(**arguments)
        for name in ("version", "orientation", "alpha", "reduction", "filter"):
            if getattr(spec, name) != getattr(cls(), name):
                raise ModelError(
                    f"preprocessing: {name} {getattr(spec, name)!r} is not supported by this"
                    " version of covergenre; install the version that trained the model",
                    code="preprocessing_unsupported",
                )
        return spec


def sha256(data: bytes) -> str:
    """Hex digest of a cover's source bytes; equal digests mean the same cover."""
    return hashlib.sha256(data).hexdigest()


def decode(data: bytes, spec: Preprocessing) -> NDArray[np.uint8]:
    """Pixels of an encoded cover, uint8 [side, side, 3]. Raises CoverError."""
    image, _ = _read(data, at_least=2 * spec.side)
    return _resized(image, spec)


def decode_image(image: Image.Image, spec: Preprocessing) -> NDArray[np.uint8]:
    """Pixels of an image in memory; see `decode`. It is not decoded at a reduced size."""
    return _resized(_load_rgb(image, None), spec)


def decode_rgb(data: bytes) -> Image.Image:
    """An encoded cover at its full size: upright, in sRGB, over white. Raises CoverError."""
    return _read(data, at_least=None)[0]


def _resized(image: Image.Image, spec: Preprocessing) -> NDArray[np.uint8]:
    if image.size != (spec.side, spec.side):
        image = image.resize((spec.side, spec.side), _FILTERS[spec.filter])
    return np.asarray(image)


def validate_and_reencode(data: bytes, max_side: int | None) -> bytes:
    """Check that a cover decodes, and return the bytes to store. Raises CoverError.

    A cover whose longer side exceeds `max_side` pixels is re-encoded as JPEG at that size, keeping
    its aspect ratio. Smaller covers, and all covers if `max_side` is None, are returned unchanged.
    """
    # Decoded at twice the stored size, so that the DCT scaling costs no sharpness.
    image, size = _read(data, at_least=2 * max_side if max_side else None)
    if max_side is None or max(size) <= max_side:
        return data
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=None)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return out.getvalue()


def check_size(data: bytes) -> None:
    """Raises CoverError if a file is empty or too large."""
    if not data:
        raise CoverError("empty_file")
    if len(data) > MAX_BYTES:
        raise CoverError("file_too_large", f"{len(data):,} bytes, limit {MAX_BYTES:,}")


def _read(data: bytes, at_least: int | None) -> tuple[Image.Image, tuple[int, int]]:
    """The upright RGB image (see _load_rgb), and the size in the file header."""
    check_size(data)
    data = without_stray_bytes(data)
    try:
        return _read_without_repair(data, at_least)
    except CoverError as error:
        if error.reason not in ("not_an_image", "truncated_image"):
            raise
        # A copy: the traceback of `error` would keep the pixels of the first attempt in memory.
        failure = CoverError(error.reason, error.detail)
    repaired_data = repaired_jpeg(data) or repaired(data)
    if repaired_data is None:
        raise failure
    return _read_without_repair(repaired_data, at_least)


def _read_without_repair(data: bytes, at_least: int | None) -> tuple[Image.Image, tuple[int, int]]:
    image = _open(data)
    size = image.size
    return _load_rgb(image, at_least), size


def _open(data: bytes) -> ImageFile:
    """The image with only its header read."""
    with warnings.catch_warnings():
        # Pillow warns about damaged metadata and large images, which are checked below.
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise CoverError("too_many_pixels", one_line(error)) from error
        except UnidentifiedImageError as error:
            raise CoverError("not_an_image", f"starts with {data[:8].hex(' ')}") from error
        except Exception as error:  # decoders raise almost any exception on hostile bytes
            raise _cover_error(error) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise CoverError("too_many_pixels", f"{width} x {height}, limit {MAX_PIXELS:,}")
    return image


def _load_rgb(image: Image.Image, at_least: int | None) -> Image.Image:
    """The upright RGB image. JPEGs may be downscaled, with no side below `at_least` pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if at_least is not None and isinstance(image, ImageFile):
                image.draft(None, (at_least, at_least))  # JPEG only; no effect on others
            image.load()
            return _to_rgb(_upright(image), image)
        except Exception as error:  # SyntaxError, OSError, struct.error, ...
            raise _cover_error(error) from error


def _cover_error(error: Exception) -> CoverError:
    reason = "too_much_memory" if isinstance(error, MemoryError) else "truncated_image"
    return CoverError(reason, one_line(error))


def one_line(error: Exception) -> str:
    """Type and message of an exception, in at most 200 characters."""
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


def _upright(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it fails if any other EXIF field is damaged.
    try:
        transposition = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # unreadable EXIF is ignored; the pixels are intact
        transposition = None
    return image if transposition is None else image.transpose(transposition)


def _to_rgb(image: Image.Image, file: Image.Image) -> Image.Image:
    """sRGB over white, as an image viewer shows it. `file`: the file that `image` was read from."""
    alpha = _alpha(image) if image.has_transparency_data else None
    rgb = _to_srgb(_colors(image, file), file.info.get("icc_profile"))
    if alpha is None:
        return rgb
    over_white = Image.new("RGB", rgb.size, "white")
    over_white.paste(rgb, mask=alpha)  # the pixels of Image.alpha_composite, in half the time
    return over_white


def _alpha(image: Image.Image) -> Image.Image:
    if image.mode in _HIGH_BIT_DEPTH:  # one gray level is transparent
        opaque = np.asarray(image) != image.info["transparency"]
        return Image.fromarray(opaque.astype(np.uint8) * np.uint8(255))
    return (image if "A" in image.getbands() else image.convert("RGBA")).getchannel("A")


def _colors(image: Image.Image, file: Image.Image) -> Image.Image:
    """The image without alpha, in a mode that profiles apply to: L, RGB, CMYK or LAB (8 bits)."""
    if image.mode in _HIGH_BIT_DEPTH:
        return _to_8_bits(image, file)
    if image.mode in ("1", "LA"):
        return image.convert("L")
    return image if image.mode in ("L", "RGB", "CMYK", "LAB") else image.convert("RGB")


def _to_8_bits(image: Image.Image, file: Image.Image) -> Image.Image:
    """Grayscale scaled to 8 bits, where Pillow would clip at 255. Floats range from 0 to 1."""
    samples = np.asarray(image)
    bits, signed, inverted = 16, False, False
    if isinstance(file, TiffImageFile):
        tags = file.tag_v2
        bits = tags[ExifTags.Base.BitsPerSample][0]
        signed = tags.get(ExifTags.Base.SampleFormat, (1,))[0] == 2
        inverted = tags[ExifTags.Base.PhotometricInterpretation] == 0
    if samples.dtype == np.int32 and not signed:
        samples = samples.view(np.uint32)
    white = 1 if image.mode == "F" else 2 ** (bits - signed) - 1
    gray = samples.astype(np.float32)
    gray *= 255
    gray /= white
    np.nan_to_num(gray, copy=False)
    np.clip(gray, 0, 255, out=gray)
    return Image.fromarray((255 - gray if inverted else gray).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The image in sRGB, converted by its ICC profile if it has a usable one."""
    if profile or image.mode == "LAB":
        transform = _transform(profile or b"", image.mode)
        if transform is not None:
            return transform.apply(image)
    return image if image.mode == "RGB" else image.convert("RGB")


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Transform to sRGB; None if the profile is broken, for another mode, or sRGB itself."""
    try:
        transform = ImageCms.ImageCmsTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else _builtin_profile("LAB"),
            _builtin_profile("sRGB"),
            mode,
            "RGB",
            # as image viewers do: paper is white, and the darkest ink black
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (OSError, ValueError):
        return None
    if mode in ("L", "RGB"):
        steps = np.arange(0, 256, 17, dtype=np.uint8)
        grid = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(64, 64, 3)
        sample = Image.fromarray(grid).convert(mode)
        difference = np.asarray(transform.apply(sample)).astype(int) - np.asarray(
            sample.convert("RGB")
        )
        if np.abs(difference).max() <= _SRGB_TOLERANCE:
            return None
    return transform


@cache
def _builtin_profile(name: Literal["LAB", "sRGB"]) -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(name))

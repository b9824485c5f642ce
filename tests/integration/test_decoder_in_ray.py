"""The decoder process inside a Ray worker."""

import contextlib
import os
import sys

import psutil
from images import encoded, many_scans
from PIL import Image

from covergenre.data.decoder_process import MEMORY_BYTES, Decoder
from covergenre.data.image_decoding import CoverError


def reasons(covers: list[tuple[int, bytes]]) -> tuple[int, list[str]]:
    """(the worker's process id, why each of these (memory limit, cover) is rejected, or "good")"""
    found = []
    for memory, data in covers:
        with contextlib.closing(Decoder(seconds=0.5, memory=memory)) as decoder:
            try:
                decoder.validate_and_reencode(data, 1500)
                found.append("good")
            except CoverError as error:
                found.append(error.reason)
    return os.getpid(), found


def small_memory() -> int:
    """Address space in bytes that suffices for a small cover and not for one of 3000 x 3000."""
    before = set(psutil.Process().children())
    with contextlib.closing(Decoder()) as decoder:
        decoder.validate_and_reencode(encoded(Image.new("RGB", (8, 8))), 300)
        (child,) = set(psutil.Process().children()) - before
        return int(child.memory_info().vms) + 20 * 2**20


def test_ray_worker_outlives_covers_that_end_its_decoder(local_ray: None) -> None:
    import ray

    # Workers import installed code only, and this module is not.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    good = encoded(Image.new("RGB", (64, 64)), "JPEG")
    large = encoded(Image.linear_gradient("L").resize((3000, 3000)).convert("RGB"))
    covers = [(MEMORY_BYTES, data) for data in (good, many_scans(200_000), b"?", good)]
    worker, found = ray.get(ray.remote(reasons).remote([*covers, (small_memory(), large)]))
    assert worker != os.getpid()
    assert found == ["good", "decode_timeout", "not_an_image", "good", "too_much_memory"]

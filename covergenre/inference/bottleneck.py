"""What limited the rate of a run, from the measured times of its parts, and what would help."""

import math

from covergenre.formatting import plural
from covergenre.inference.batches import Seconds

_SMALL_SHARE = 0.1
"""Of the time, in which waiting is not worth a remedy."""


def bottleneck(seconds: Seconds, *, workers: int, use_gpu: bool) -> str:
    """One line: what the model waited for, or how busy it was, and the remedy.

    seconds: sums over all processes, of
        fetch, decode: loading covers;
        transfer: from there to the model;
        wait: the model waited for covers; model: it computed;
        write: writing output parts; write_wait: the model waited for that.
    Empty if nothing was measured.
    """
    model, wait, write_wait = (seconds.get(name, 0.0) for name in ("model", "wait", "write_wait"))
    total = model + wait + write_wait
    if not model:
        return ""
    waited = "GPUs waited" if use_gpu else "the model waited"
    if write_wait > max(wait, _SMALL_SHARE * total):
        return (
            f"bottleneck: {waited} {write_wait / total:.0%} of the time for output parts to be"
            " written; a faster store would help, or for score a higher --part-rows"
        )
    fetch, decode = seconds.get("fetch", 0.0), seconds.get("decode", 0.0)
    if wait > _SMALL_SHARE * total and fetch > decode:
        return (
            f"bottleneck: {waited} {wait / total:.0%} of the time for covers, which took longer to"
            " read or download than to decode; a nearer store would help, or where each cover is a"
            " file or URL a higher --download-concurrency of score"
        )
    if use_gpu and wait > _SMALL_SHARE * total:
        busy = (fetch + decode) / (total / workers)
        more = math.ceil(busy * wait / model)
        verb = "core would feed" if more == 1 else "cores would feed"
        return (
            f"bottleneck: {waited} {wait / total:.0%} of the time for covers: {more:,} more CPU"
            f" {verb} them"
        )
    if use_gpu:
        return (
            f"bottleneck: the model: GPUs computed {model / total:.0%} of the time; more than"
            f" {plural(workers, 'GPU')} (--workers) would be faster"
        )
    # The model and the loading tasks share the cores.
    work = {
        "model": model,
        "decoding": decode,
        "reading": fetch,
        "writing": seconds.get("write", 0.0),
    }
    shares = ", ".join(f"{name} {value / sum(work.values()):.0%}" for name, value in work.items())
    return (
        f"bottleneck: the CPU ({shares}); more cores, a GPU, or a smaller or quantized model would"
        " be faster"
    )

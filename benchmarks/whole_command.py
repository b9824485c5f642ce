"""Seconds of the whole command `covergenre score` and of a plain PyTorch script, in turn.

    uv run python -m benchmarks.whole_command                        # 64 and 1,500 covers
    uv run python -m benchmarks.whole_command --covers 64 --runs 5

From the start of the process to its end, with imports, on synthetic covers of 300 x 300 pixels and
an
untrained model, whose speed is that of a trained one. Prints a table in Markdown: the median of the
runs, with the lowest and the highest, and the ratio of the medians.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import run_benchmark
from covergenre.demo.sample import write_sample, write_untrained_model


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--covers", type=int, nargs="+", default=[64, 1500])
    parser.add_argument("--model", default="mobilenet_v2")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    print("| covers | `covergenre score` | plain script | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = write_untrained_model(str(folder / "model"), model=args.model)
        for covers in args.covers:
            catalog = write_sample(folder / str(covers), covers, side=300)
            out = folder / "labels"
            ours = [sys.executable, "-m", "covergenre", "score", model, str(catalog)]
            ours += ["--out", str(out)]
            plain = [sys.executable, "-m", "benchmarks.plain_script", str(catalog)]
            plain += [str(folder / "plain.parquet"), "--model", args.model]
            times = _alternately([ours, plain], args.runs, out)
            ratio = statistics.median(times[1]) / statistics.median(times[0])
            print(f"| {covers:,} | {_shown(times[0])} | {_shown(times[1])} | {ratio:.2f} |")


def _alternately(commands: Sequence[list[str]], runs: int, out: Path) -> list[list[float]]:
    """Seconds of each run of each command, in turn; `out` is removed before each."""
    times: list[list[float]] = [[] for _ in commands]
    for run in range(runs):
        order = list(zip(commands, times, strict=True))
        for command, found in order if run % 2 == 0 else order[::-1]:
            shutil.rmtree(out, ignore_errors=True)
            began = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            found.append(time.perf_counter() - began)
    return times


def _shown(times: list[float]) -> str:
    return f"{statistics.median(times):.1f} s ({min(times):.1f} to {max(times):.1f})"


if __name__ == "__main__":
    run_benchmark(main)

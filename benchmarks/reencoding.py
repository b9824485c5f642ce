"""Effect of re-encoding by prepare on the scores: the same covers original and re-encoded.

    uv run python -m benchmarks.reencoding MODEL [DIRECTORY_OF_COVERS]

prepare stores a cover whose longer side is over 300 pixels as a smaller JPEG, while score decodes
original covers. This prints how much their scores differ, over all covers and genres. Without a
directory it uses 200 synthetic covers of 900 pixels.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import run_benchmark
from covergenre.config import PrepareConfig
from covergenre.data.image_decoding import decode, validate_and_reencode
from covergenre.demo.sample import write_sample
from covergenre.models.bundle import read_bundle
from covergenre.models.inference import load_for_inference


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("covers", type=Path, nargs="?")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        covers = args.covers or write_sample(Path(folder), 200, side=900).parent / "covers"
        print(json.dumps(compare(args.model, covers)))


def compare(model_uri: str, covers: Path) -> dict[str, float]:
    """Differences between the scores of original and re-encoded images in `covers`."""
    max_side = int(PrepareConfig.model_fields["max_side"].default)
    bundle = read_bundle(model_uri)
    model = load_for_inference(bundle, "cpu")
    original, prepared, changed = [], [], 0
    for path in sorted(path for path in covers.iterdir() if path.is_file()):
        data = path.read_bytes()
        reencoded = validate_and_reencode(data, max_side)
        changed += reencoded != data
        original.append(decode(data, bundle.preprocessing))
        prepared.append(decode(reencoded, bundle.preprocessing))
    before, after = (model.scores(np.stack(pixels), 64) for pixels in (original, prepared))
    difference = np.abs(before - after)
    return {
        "covers": len(original),
        "re_encoded": changed,
        "mean_score_difference": round(float(difference.mean()), 5),
        "largest_score_difference": round(float(difference.max()), 5),
    }


if __name__ == "__main__":
    run_benchmark(main)

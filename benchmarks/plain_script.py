"""What `covergenre score` is compared with: a plain PyTorch script that labels the same covers.

    uv run python -m benchmarks.plain_script CATALOG OUT --model mobilenet_v2 --genres 8

As most people would write it: a Dataset, a DataLoader with a process per core, torchvision's model
in float32, one Parquet file. It rejects nothing, resumes nothing and isolates no decoder.
"""

import argparse
import csv
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2


class _Covers(Dataset[torch.Tensor]):
    def __init__(self, files: list[Path]) -> None:
        self._files = files
        self._transform = v2.Compose(
            [
                v2.ToImage(),
                v2.Resize((224, 224), antialias=True),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> torch.Tensor:
        image: torch.Tensor = self._transform(Image.open(self._files[index]).convert("RGB"))
        return image


def main() -> None:
    """Label a CSV catalog with the columns album_id and cover."""
    parser = argparse.ArgumentParser()
    parser.add_argument("catalog", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="mobilenet_v2")
    parser.add_argument("--genres", type=int, default=8)
    args = parser.parse_args()
    with args.catalog.open(newline="") as file:
        rows = list(csv.DictReader(file))
    model = torchvision.models.get_model(args.model, num_classes=args.genres).eval()
    covers = _Covers([args.catalog.parent / row["cover"] for row in rows])
    loader = DataLoader(covers, batch_size=64, num_workers=os.cpu_count() or 1)
    with torch.inference_mode():
        scores = np.concatenate([torch.sigmoid(model(batch)).numpy() for batch in loader])
    ids = [row["album_id"] for row in rows]
    pq.write_table(pa.table({"album_id": ids, "scores": list(scores)}), args.out)


if __name__ == "__main__":
    main()

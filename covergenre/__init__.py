"""Predicts the genres of albums from their covers, on one machine or on a Ray cluster.

    import covergenre as cg

    model = cg.load_model("s3://music/models/vgg16")
    scores = model.predict(["a.jpg", "https://example.org/b.png"])
    scores.labels(), scores.top(3), scores.to_pandas()

All public names are in this module. They are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from covergenre.api.batch_predictor import BatchPredictor
    from covergenre.api.labels import read_labels
    from covergenre.api.model import Model, load_model
    from covergenre.api.scores import Scores
    from covergenre.api.stages import (
        Evaluation,
        PreparedDataset,
        QuantizedModel,
        ScoringRun,
        TrainingRun,
        evaluate,
        prepare,
        quantize,
        score,
        train,
    )
    from covergenre.api.torch_dataset import CoverDataset, load_dataset
    from covergenre.progress import ProgressEvent

__all__ = [
    "BatchPredictor",
    "CoverDataset",
    "Evaluation",
    "Model",
    "PreparedDataset",
    "ProgressEvent",
    "QuantizedModel",
    "Scores",
    "ScoringRun",
    "TrainingRun",
    "__version__",
    "evaluate",
    "load_dataset",
    "load_model",
    "prepare",
    "quantize",
    "read_labels",
    "score",
    "train",
]

_MODULES = {
    "api.batch_predictor": ["BatchPredictor"],
    "api.labels": ["read_labels"],
    "api.model": ["Model", "load_model"],
    "api.scores": ["Scores"],
    "api.stages": [
        *("Evaluation", "PreparedDataset", "QuantizedModel", "ScoringRun", "TrainingRun"),
        *("evaluate", "prepare", "quantize", "score", "train"),
    ],
    "api.torch_dataset": ["CoverDataset", "load_dataset"],
    "progress": ["ProgressEvent"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'covergenre' has no attribute {name!r}")
    value = getattr(import_module(f"covergenre.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> "list[str]":  # quoted, so that old Pythons can import it
    return sorted({*globals(), *__all__})

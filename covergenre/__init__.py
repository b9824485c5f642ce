"""covergenre: album genres from covers, on one machine or on a Ray cluster.

    import covergenre as cg

    model = cg.load_model("s3://music/models/vgg16")
    scores = model.predict(["a.jpg", "https://example.org/b.png"])
    scores.labels(), scores.top(3), scores.to_pandas()

Everything public is a name of this module, and is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from covergenre.api.labels import read_labels
    from covergenre.api.model import Model, load_model
    from covergenre.api.scores import Scores
    from covergenre.api.torch_dataset import CoverDataset, load_dataset
    from covergenre.progress import ProgressEvent

__all__ = [
    "CoverDataset",
    "Model",
    "ProgressEvent",
    "Scores",
    "__version__",
    "load_dataset",
    "load_model",
    "read_labels",
]

_MODULES = {
    "CoverDataset": "api.torch_dataset",
    "Model": "api.model",
    "ProgressEvent": "progress",
    "Scores": "api.scores",
    "load_dataset": "api.torch_dataset",
    "load_model": "api.model",
    "read_labels": "api.labels",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'covergenre' has no attribute {name!r}")
    value = getattr(import_module(f"covergenre.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

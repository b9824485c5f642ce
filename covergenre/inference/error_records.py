"""Exceptions as records in the data, so that a worker can report one without failing its task.

Ray retries a task that fails, and does not distinguish its exception from a crash of its worker.
"""

import json
import traceback

from covergenre import errors


def to_record(error: Exception) -> str:
    """`error` as JSON: its class, message, code and traceback."""
    return json.dumps(
        {
            "class": type(error).__name__,
            "message": str(error),
            "code": getattr(error, "code", ""),
            "traceback": "".join(traceback.format_exception(error)),
        }
    )


def raise_record(record: str) -> None:
    """Raise the error of a record: of its class in covergenre.errors, otherwise a RuntimeError."""
    error = json.loads(record)
    class_ = getattr(errors, error["class"], None)
    if class_ is not None:
        raise class_(error["message"], code=error["code"])
    raise RuntimeError(f"in a worker:\n{error['traceback']}")

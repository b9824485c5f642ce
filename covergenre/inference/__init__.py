"""Inference on the cluster: the rows of a plan to scores. evaluate and score use it."""

from covergenre.inference.outcomes import ScoredRows as ScoredRows
from covergenre.inference.pipeline import decoded as decoded
from covergenre.inference.pipeline import score_plan as score_plan

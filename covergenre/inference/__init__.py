"""Inference: the rows of a plan to output parts. evaluate and score use it."""

from covergenre.inference.batches import decoded as decoded
from covergenre.inference.scoring import Scoring as Scoring

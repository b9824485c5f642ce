"""Inference on the cluster: the rows of a plan to scores. evaluate and score use it."""

from covergenre.inference.actors import score_parts as score_parts
from covergenre.inference.batches import decoded as decoded

"""What is measured on a network while and after it is trained: its features, its speed-ups.

A measure is called before training and returns a function that is called on the finished network
and gives its rows (results.MEASURE_COLUMNS). Experiments name the measures they need.
"""

from lib.measures.features import observe_features
from lib.measures.speedups import observe_speedups
from lib.train import Measure

MEASURES: dict[str, Measure] = {"features": observe_features, "speedups": observe_speedups}

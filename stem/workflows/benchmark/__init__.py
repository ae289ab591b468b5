"""Edits of a published benchmark, FiVE or IVEBench, judged all together."""

from .judging import JudgedEdit
from .measuring import ALL, BenchmarkEvaluation, MeanFigure, evaluate_benchmark

__all__ = ["ALL", "BenchmarkEvaluation", "JudgedEdit", "MeanFigure", "evaluate_benchmark"]

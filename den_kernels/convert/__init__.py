"""Residual branches with elastic hidden channels in models written by others: see `convert`."""

from .advise import Advice, advise
from .carrier import ElasticModel, WithLevels, levels, report_of
from .convert import convert
from .extract import extract
from .flops import LevelFlops, level_flops
from .freeze import freeze
from .latency import LatencyTable, latency_table
from .recalibrate import recalibrate
from .report import Block, LeftAlone, Report

__all__ = [
    "Advice",
    "Block",
    "ElasticModel",
    "LatencyTable",
    "LeftAlone",
    "LevelFlops",
    "Report",
    "WithLevels",
    "advise",
    "convert",
    "extract",
    "freeze",
    "latency_table",
    "level_flops",
    "levels",
    "recalibrate",
    "report_of",
]

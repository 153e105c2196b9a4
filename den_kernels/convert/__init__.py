"""Residual branches with elastic hidden channels in models written by others: see `convert`."""

from .advise import Advice, advise
from .carrier import ElasticModel, levels
from .convert import convert
from .extract import extract
from .latency import LatencyTable, latency_table
from .recalibrate import recalibrate
from .report import Block, LeftAlone, Report

__all__ = [
    "Advice",
    "Block",
    "ElasticModel",
    "LatencyTable",
    "LeftAlone",
    "Report",
    "advise",
    "convert",
    "extract",
    "latency_table",
    "levels",
    "recalibrate",
]

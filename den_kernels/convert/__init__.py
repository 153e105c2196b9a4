"""Residual branches with elastic hidden channels in models written by others: see `convert`."""

from .carrier import ElasticModel, levels
from .convert import convert
from .report import Block, LeftAlone, Report

__all__ = ["Block", "ElasticModel", "LeftAlone", "Report", "convert", "levels"]

"""Adapter layouts, one per file. A new layout is a new file here and an entry in FORMATS.

Each turns pairs of factors as stored into plain ones: an ordinary linear module, or gate / up / down of one expert.
"""

from loaders.adapter_formats.base import AdapterBuilder, AdapterFormat, FormatContext
from loaders.adapter_formats.linear import LinearFormat
from loaders.adapter_formats.param_wrapper import ParamWrapperFormat
from loaders.adapter_formats.per_expert import PerExpertFormat

__all__ = ["FORMATS", "AdapterBuilder", "AdapterFormat", "FormatContext"]

# The first format that recognises a module gets it; LinearFormat takes the rest and explains what it does not know.
FORMATS: tuple[AdapterFormat, ...] = (PerExpertFormat(), ParamWrapperFormat(), LinearFormat())

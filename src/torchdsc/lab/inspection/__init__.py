"""A saved model or adapter as it is: its routed layers, their atoms, bounds and routing."""

from torchdsc.lab.saved import Saved, load_saved

from .report import write_inspection
from .state import Inspection, inspect

__all__ = ["Inspection", "Saved", "inspect", "load_saved", "write_inspection"]

"""The run as one self-contained HTML page: `write(path, Report(...))`."""

from jepax.report.page import Report, render, write
from jepax.report.parts import Pictures

__all__ = ["Pictures", "Report", "render", "write"]

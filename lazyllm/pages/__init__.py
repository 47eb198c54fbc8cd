"""Self-contained HTML files that people look at: one prompt from the inside, and the report of a study."""

from lazyllm.pages.inspection import inspect
from lazyllm.pages.report import Column, Estimate, Figure, Item, Reply, ReportData, Row, report

__all__ = ["Column", "Estimate", "Figure", "Item", "Reply", "ReportData", "Row", "inspect", "report"]

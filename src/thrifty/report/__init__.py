"""What people look at: the terminal table, the HTML report with its trace viewer, the picture for a README."""

from thrifty.report.html import picture, write_report
from thrifty.report.table import table

__all__ = ["picture", "table", "write_report"]

"""Reports as pages: rows for a console, Markdown, and one HTML page that needs no network.

Nothing here measures: an audit.json holds everything, so a page can be made again without a model.
"""

from repedit.report.comparison import ReportComparison, compare_reports
from repedit.report.html import page
from repedit.report.markdown import markdown
from repedit.report.redaction import redacted
from repedit.report.run_page import run_page, write_run
from repedit.report.writing import schema, write
from repedit.runs import RunReport

__all__ = [
    "ReportComparison",
    "RunReport",
    "compare_reports",
    "markdown",
    "page",
    "redacted",
    "run_page",
    "schema",
    "write",
    "write_run",
]

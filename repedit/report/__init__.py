"""Reports as console tables, as Markdown, and as HTML pages that need no network.

Nothing here measures: audit.json holds all results, so pages can be made again without a model.
"""

from repedit.report.pages import (
    ReportComparison,
    compare_reports,
    comparison_page,
    difference_page,
    markdown,
    page,
    schema,
    write,
)
from repedit.report.redaction import redacted
from repedit.report.run_pages import run_page, write_run
from repedit.runs import RunReport

__all__ = [
    "ReportComparison", "RunReport", "compare_reports", "comparison_page", "difference_page", "markdown", "page",
    "redacted", "run_page", "schema", "write", "write_run",
]  # fmt: skip

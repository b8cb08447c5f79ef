"""Reports as pages: rows for a console, Markdown, and one HTML page that needs no network.

Nothing here measures: an audit.json holds everything, so a page can be made again without a model.
"""

from repedit.report.joint import Together, together
from repedit.report.pages import page
from repedit.report.prose import markdown
from repedit.report.runs import RunReport, run_page, write_run
from repedit.report.withholding import withheld
from repedit.report.writing import schema, write

__all__ = [
    "RunReport",
    "Together",
    "markdown",
    "page",
    "run_page",
    "schema",
    "together",
    "withheld",
    "write",
    "write_run",
]

"""Reports as pages: rows for a console, Markdown, and one HTML page that needs no network.

Nothing here measures: an audit.json holds everything, so a page can be made again without a model.
"""

from repedit.report.comparison import Together, together
from repedit.report.html import page
from repedit.report.markdown import markdown
from repedit.report.redaction import withheld
from repedit.report.run_page import RunReport, run_page, write_run
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

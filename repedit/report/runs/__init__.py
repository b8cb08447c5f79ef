"""The page of a whole run, made from the files it left: account, edits, checkpoints, audits."""

from repedit.report.runs.gathering import RunReport, Stage, gather
from repedit.report.runs.page import run_page, write_run

__all__ = ["RunReport", "Stage", "gather", "run_page", "write_run"]

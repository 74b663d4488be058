"""report.html: one page that opens without a network, made from what a release's stages recorded."""

from phoneready.report.inputs import ReportInput, project_files, read_verdicts
from phoneready.report.page import render_page

__all__ = ["ReportInput", "project_files", "read_verdicts", "render_page"]

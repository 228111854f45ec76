"""Reports: one self-contained HTML page for a study or a run, its verdict in words, its figures and tables as files."""

from puma.report.page import export, write_summary
from puma.report.study import make_report, write_report
from puma.report.study_data import verdict

__all__ = ["export", "make_report", "verdict", "write_report", "write_summary"]

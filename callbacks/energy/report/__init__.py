"""Pages about energy that open without a network: of one run, and of a study of several."""

from callbacks.energy.report.page import Section, markdown, page, png
from callbacks.energy.report.run import MAX_MACHINES, run_page
from callbacks.energy.report.run_files import merge, run_summary, trace_points
from callbacks.energy.report.study import STUDY_TITLE, headlines, study_figures, study_sections

__all__ = [
    "MAX_MACHINES",
    "STUDY_TITLE",
    "Section",
    "headlines",
    "markdown",
    "merge",
    "page",
    "png",
    "run_page",
    "run_summary",
    "study_figures",
    "study_sections",
    "trace_points",
]

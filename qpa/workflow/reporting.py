"""The stage report: one page that shows the run.

The page is removed before anything that it shows is made again, so that one that is there is right.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from qpa.pipeline.options import option
from qpa.report.page.write import write_report
from qpa.report.samples import read_prompts
from qpa.store.run_directory import REPORT
from qpa.training.continuation import ContinuePrompts
from qpa.workflow.resolved import formats_of
from qpa.workflow.stage import NOT_MADE, Work


@dataclass(frozen=True)
class ReportOptions:
    """The options of the page; how prompts are continued is in those of `ContinuePrompts`."""

    section: ClassVar[str] = "report"

    prompts: str | None = option(
        None,
        help="Text file with prompts to show before and after, one a line.",
        is_path=True,
        shown_default="the beginning of the evaluation split",
        provenance=False,
    )


class Report:
    """Write the page."""

    name: ClassVar[str] = "report"
    carries: ClassVar[bool] = False

    def change(self, work: Work) -> str | None:
        """See `Stage`."""
        return None if (work.run.path / REPORT).is_file() else NOT_MADE

    def make(self, work: Work) -> str:
        """Write the page of the run with all exports of the configuration."""
        configuration = work.configuration
        prompts = configuration.make(ReportOptions).prompts
        path = write_report(
            work.run,
            exports=[configuration.export_path(name) for name in formats_of(configuration)],
            prompts=read_prompts(Path(prompts)) if prompts else (),
            options=configuration.make(ContinuePrompts),
            progress=work.progress,
        )
        return str(path)

"""What a stage of a run is, and what it works with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from qpa.documents import Document, Input, ResolvedConfiguration, TrainedFrom
from qpa.pipeline.configuration import Configuration
from qpa.pipeline.pass_protocol import PassContext
from qpa.progress import Progress
from qpa.store.run_directory import RunDirectory

NOT_MADE = "not made yet"


@dataclass
class Work:
    """What the stages of one run share.

    Args:    configuration: what is asked for.
             run: the directory, which this process holds.
             before: the configuration that the run had before; None for a new run.
             inputs: the base model and the data of now.
             progress: called now and then by what takes longer than a second.
             say: called with a line for the user.
             trained: what the trained generator in the directory was made from.
             may_resume: whether an interrupted training may go on.
    """

    configuration: Configuration
    run: RunDirectory
    before: ResolvedConfiguration | None
    inputs: tuple[Input, ...]
    progress: Progress
    say: Callable[[str], None]
    trained: TrainedFrom | None
    may_resume: bool = True

    def context(self, last: type[Document]) -> PassContext:
        """Return the context of a pass, with the documents of the run up to one."""
        documents = self.run.read_through(last)
        return PassContext(self.configuration.seed, self.run.files, documents, self.progress)


class Stage(Protocol):
    """A part of a run, which is done or has to be done."""

    @property
    def name(self) -> str:
        """Return what a user calls it."""
        ...

    @property
    def carries(self) -> bool:
        """Return whether what comes after it is made anew with it."""
        ...

    def change(self, work: Work) -> str | None:
        """Return why it has to be done; None if it is done and nothing it is made from has changed.

        `NOT_MADE` is for what was never done, or was lost with what it is made from.

        Raises:  DocumentError: what is there is damaged, or was made by a newer qpa.
        """
        ...

    def make(self, work: Work) -> str:
        """Do it, and return in words what came of it."""
        ...

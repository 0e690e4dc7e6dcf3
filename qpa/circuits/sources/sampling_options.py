"""What a user may ask of a source, wherever circuits are run: the options of training and of measuring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qpa.circuits.circuit_options import PANEL
from qpa.circuits.sources.source import SOURCES, Cost, Source, SourceSettings
from qpa.errors import OptionError
from qpa.pipeline.options import option


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """The options of a source besides its name.

    Args:    shots: of every circuit; None is the source's own choice.
             backend: the name of a backend, see `qpa.circuits.sources.backend`.
             session, batch: run all jobs in one session, or in one batch, of the backend.
             yes: a backend that may cost money is used without a further question.
    """

    panel: ClassVar[str] = PANEL

    shots: int | None = option(
        None, help="Shots of every circuit.", at_least=1, shown_default="8192 where circuits are sampled"
    )
    backend: str | None = option(
        None, help="Backend of the source backend: fake_torino, ibm_.., or module:callable."
    )
    session: bool = option(
        False, help="Run all jobs in one session of the backend, for devices of IBM.", provenance=False
    )
    batch: bool = option(
        False,
        help="Run all jobs in one batch of the backend, for accounts of IBM without sessions.",
        provenance=False,
    )
    yes: bool = option(False, help="Use a backend that may cost money.", provenance=False)

    def make_source(self, name: str, seed: int) -> Source:
        """Return the source of a name.

        Raises:  OptionError: it is unknown, or cannot use these options.
        """
        kind = SOURCES[name]
        if self.backend is not None and not kind.needs_backend:
            raise OptionError("backend", f"none for the source {name}", self.backend, "name it with `source`")
        return kind(SourceSettings(seed, self.shots, self.backend, self.session, self.batch))

    def check_consent(self, source: Source, cost: Cost) -> None:
        """Check that the user agreed to what a source may cost.

        Args:    cost: of all calls.
        Raises:  OptionError: the source may cost money, and the user has not said `yes`.
        """
        if not source.is_paid or self.yes:
            return
        words = f"{cost.n_jobs:,} jobs with {cost.n_executions:,} executions"
        expected = f"consent to {words} on a backend that may cost money"
        raise OptionError("yes", expected, "none", "pass `yes`, or try a fake backend first")

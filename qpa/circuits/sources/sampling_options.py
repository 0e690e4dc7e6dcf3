"""What a user may ask of a source, wherever circuits are run: the options of training and of measuring."""

from __future__ import annotations

from dataclasses import dataclass

from qpa.circuits.sources.source import SOURCES, Cost, Source, SourceSettings
from qpa.errors import OptionError
from qpa.pipeline.options import option


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """The options of a source besides its name.

    Args:    shots: of every circuit; None is the source's own choice.
             backend: the name of a backend, see `qpa.circuits.sources.backend`.
             session: run all jobs in one session of the backend.
             yes: a backend that may cost money is used without a further question.
    """

    shots: int | None = option(
        None, help="Shots of every circuit.", at_least=1, shown_default="8192 where circuits are sampled"
    )
    backend: str | None = option(
        None, help="Backend of the source backend: fake_torino, ibm_.., or module:callable."
    )
    session: bool = option(
        False, help="Run all jobs in one session of the backend, for devices of IBM.", provenance=False
    )
    yes: bool = option(False, help="Use a backend that may cost money.", provenance=False)

    def make_source(self, name: str, seed: int) -> Source:
        """Return the source of a name.

        Raises:  OptionError: it is unknown, or cannot use these options.
        """
        kind = SOURCES[name]
        if self.backend is not None and not kind.needs_backend:
            raise OptionError("backend", f"none for the source {name}", self.backend, "name it with `source`")
        return kind(SourceSettings(seed, self.shots, self.backend, self.session))

    def check_consent(self, source: Source, cost: Cost, n_calls: int) -> None:
        """Check that the user agreed to what a source may cost.

        Args:    cost: of one call; n_calls: how often it is made.
        Raises:  OptionError: the source may cost money, and the user has not said `yes`.
        """
        if not source.is_paid or self.yes:
            return
        jobs, executions = n_calls * cost.n_jobs, n_calls * cost.n_executions
        expected = f"consent to {jobs:,} jobs with {executions:,} executions on a backend that may cost money"
        raise OptionError("yes", expected, "none", "pass `yes`, or try a fake backend first")

"""The resolved configuration of a run, which its directory keeps."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from qpa import __version__
from qpa.documents import Package, PassOption, Provenance, ResolvedConfiguration
from qpa.exporters.registry import formats_for
from qpa.passes.inspect_model import InspectModel
from qpa.pipeline.configuration import Configuration
from qpa.store.atomic_files import write_file
from qpa.store.run_directory import REPORT
from qpa.workflow.stage import Work

PACKAGES = (
    "accelerate",
    "datasets",
    "numpy",
    "peft",
    "qiskit",
    "safetensors",
    "torch",
    "transformers",
    "trl",
)
"""The packages that compute a result, whose versions a run keeps."""


def formats_of(configuration: Configuration) -> tuple[str, ...]:
    """Return the formats that a configuration exports, by default the plainest that carries its adapter."""
    if configuration.given_formats is not None:
        return configuration.given_formats
    return formats_for(configuration.make(InspectModel).method)[:1]


def keep_configuration(work: Work) -> None:
    """Write the resolved configuration into the run, if it is not there already."""
    formats = formats_of(work.configuration)
    options = work.configuration.resolved(formats)
    document = ResolvedConfiguration(
        provenance=Provenance(
            pass_name="run-configuration",
            options=(),
            seed=work.configuration.seed,
            qpa_version=__version__,
            parents=(),
        ),
        options=tuple(PassOption(name=key, value=options[key]) for key in sorted(options)),
        formats=formats,
        inputs=work.inputs,
        trained=work.trained,
        packages=tuple(_packages()),
    )
    path = work.run.path / ResolvedConfiguration.file_name()
    content = document.to_json()
    if not path.is_file() or path.read_bytes() != content:
        drop_report(work)
        write_file(path, content)


def drop_report(work: Work) -> None:
    """Remove the page that shows the run: what it shows is about to change."""
    (work.run.path / REPORT).unlink(missing_ok=True)


def _packages() -> Iterator[Package]:
    for name in sorted((*PACKAGES, "python")):
        try:
            found = platform.python_version() if name == "python" else version(name)
        except PackageNotFoundError:
            continue
        yield Package(name=name, version=found)

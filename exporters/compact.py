"""compact: the trained numbers of an adapter on a shared basis, one file of a few hundred bytes.

Rules:
1. The file is as `qpa.serve.compact` says; its layout lies beside it in `layouts`, once for all adapters of
   one size, under the SHA-256 of its bytes. The layout is written first.
2. Angles are kept where the measurement is exact, and otherwise the probabilities that were measured.
3. The numbers, in float32, are expanded before anything is written: they have to give the frozen adapter,
   bit for bit. Then an expanded file is what the format "lora" writes.
4. A file that is there is replaced on request only, and only if it is a compact adapter.

It is no directory with a manifest, as the other formats are: thousands of them lie in one.

Source: ours.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, cast, final

from qpa.documents import AdapterSpec, FrozenAdapter, Measurement, TrainedGenerator, WeightLayout
from qpa.errors import DocumentError, ExportError
from qpa.exporters.cards.model_card import targets_head
from qpa.generators.canonical import canonical_adapter, layout_text, refusal, trained_numbers
from qpa.passes.freeze_adapter import kept_probabilities, measured_probabilities
from qpa.pipeline.options import option
from qpa.pipeline.pass_protocol import PassContext
from qpa.serve.arithmetic import Array
from qpa.serve.compact import MAGIC, NUMBERS, Compact, Numbers
from qpa.serve.layout import DIRECTORY
from qpa.store.atomic_files import write_file

FORMAT = "compact"


class Written(NamedTuple):
    """What was written.

    Args:    path, n_bytes: the compact file.
             layout: the file of its layout.
             n_numbers: how many numbers are in it.
             keeps_probabilities: whether these are probabilities in the place of angles.
    """

    path: Path
    n_bytes: int
    layout: Path
    n_numbers: int
    keeps_probabilities: bool


@final
@dataclass(frozen=True, slots=True)
class ExportCompact:
    """Write the trained numbers of an adapter on a basis.

    Args:    numbers: "float32", or "int16", which rounds them to 65,535 steps.
    Source:  ours.
    """

    name: ClassVar[str] = FORMAT
    words: ClassVar[str] = "the trained numbers alone, of an adapter on a basis; see qpa expand"
    section: ClassVar[str] = "export"

    numbers: str = option(
        "float32", help="Of compact: how the trained numbers are kept: {choices}.", choices=NUMBERS
    )

    def emit(self, frozen: FrozenAdapter, out: Path, context: PassContext, *, force: bool = False) -> Written:
        """Write the file and its layout, each whole or not at all.

        Args:    out: a new file.
                 context: of the run, with all of its documents.
                 force: replace a compact adapter that is there.
        Raises:  ExportError: the adapter has no compact form, or the file is in the way or cannot be written.
                 DocumentError: a file of the run is missing or damaged.
        """
        check_output(out, force=force)
        spec, layout = context.document(AdapterSpec), context.document(WeightLayout)
        _check(frozen, spec, layout)
        assert spec.basis is not None
        numbers, keeps_probabilities = _numbers(frozen, spec, layout, context)
        text = layout_text(layout)
        digest = hashlib.sha256(text).digest()
        chosen = context.document(TrainedGenerator).bank
        bank = 0 if chosen is None else chosen.number
        compact = Compact(bytes.fromhex(spec.basis.digest), digest, keeps_probabilities, numbers, bank)
        content = compact.as_bytes(cast(Numbers, self.numbers))
        beside = out.parent / DIRECTORY / f"{digest.hex()}.json"
        try:
            if not beside.is_file() or beside.read_bytes() != text:
                write_file(beside, text)
            check_output(out, force=force)
            write_file(out, content)
        except OSError as error:
            if isinstance(error, ExportError):
                raise
            words = error.strerror or type(error).__name__
            raise ExportError(str(out), "a file that can be written", words) from error
        return Written(out, len(content), beside, sum(map(len, numbers)), keeps_probabilities)


def check_output(out: Path, *, force: bool) -> None:
    """Check that a compact file may be written to `out`.

    Raises:  ExportError: there is something else, or one, and `force` is not given.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_file():
        raise ExportError(str(out), "a new file", "a directory" if out.is_dir() else "something else")
    with out.open("rb") as stream:
        is_compact = stream.read(len(MAGIC)) == MAGIC
    if not is_compact:
        raise ExportError(str(out), "a new file", "a file that is no compact adapter")
    if not force:
        raise ExportError(str(out), "a new file", "a compact adapter", "pass `force` to replace it")


def _check(frozen: FrozenAdapter, spec: AdapterSpec, layout: WeightLayout) -> None:
    """Check that a run has a compact form.

    Raises:  ExportError: it has none, with the reason.
    """
    subject = f"`format` {FORMAT}"
    if spec.basis is None:
        advice = "plan with `basis`, a directory of qpa basis"
        raise ExportError(subject, "an adapter planned on a shared basis", "one without", advice)
    why = refusal(layout)
    if why is not None:
        raise ExportError(subject, f"numbers that are expanded without torch: {why.expected}", why.found)
    if targets_head(frozen) and frozen.base.ties_lm_head:
        found = "one tied to the input embedding, which engines that merge it get wrong"
        raise ExportError(f"the output head of {frozen.base.name_or_path}", "one of its own", found)


def _numbers(
    frozen: FrozenAdapter, spec: AdapterSpec, layout: WeightLayout, context: PassContext
) -> tuple[tuple[Array, ...], bool]:
    """Return the arrays of the compact file, and whether the first has probabilities.

    Raises:  ExportError: they are not those of the frozen adapter.
    """
    from safetensors.torch import load_file

    from qpa.adapters.attach import initial_adapter

    measurement, trained = context.document(Measurement), context.document(TrainedGenerator)
    arrays = load_file(context.files.get(trained.arrays))
    kept = kept_probabilities(layout, measurement, measured_probabilities(measurement, context))
    try:
        found = canonical_adapter(spec, layout, arrays, initial_adapter(spec), kept)
        numbers = trained_numbers(layout, arrays, kept)
    except DocumentError as error:
        raise ExportError(error.subject, error.expected, error.found, error.advice) from error
    wanted = load_file(context.files.get(frozen.arrays))
    for path, tensor in found.items():
        if path not in wanted or not tensor.equal(wanted[path]):
            advice = "freeze it again: qpa freeze"
            raise ExportError(path, "the frozen adapter's numbers", "others, of its trained numbers", advice)
    return numbers, kept is not None

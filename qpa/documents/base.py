"""What every document of the IR has: a schema, a digest, provenance, and canonical JSON.

A document file is JSON with sorted keys. Beside the document's own fields it holds
`schema` ("qpa.<kind>/<version>") and `digest` ("sha256:" and 64 hexadecimal digits), the SHA-256 of
the same object without `digest`, dumped with sorted keys, without white space, in UTF-8.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from qpa.errors import DocumentError

JsonObject = dict[str, object]
OptionValue = bool | int | float | str | tuple[str, ...] | None


class Record(BaseModel):
    """A frozen, strict part of a document."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True, allow_inf_nan=False)


class Attachment(Record):
    """A file beside the document.

    Args:    file: name relative to the document's directory.
             sha256: the SHA-256 of the file's bytes, 64 hexadecimal digits.
             n_bytes: length of the file.
    """

    file: str
    sha256: str
    n_bytes: int

    @model_validator(mode="after")
    def _verify(self) -> Self:
        parts = self.file.split("/")
        if (
            not self.file
            or any(part in ("", ".", "..") for part in parts)
            or "\\" in self.file
            or "\0" in self.file
        ):
            raise ValueError("an attachment's file must lie inside the document's directory")
        return self


class PassOption(Record):
    """One option a pass ran with."""

    name: str
    value: OptionValue


class Provenance(Record):
    """Which pass made a document, from what, and how.

    Args:    pass_name: kebab-case name of the pass.
             options: the pass's fields in the order they are declared.
             seed: the seed the whole pipeline ran with.
             qpa_version: version of the package that wrote the document.
             parents: digests of the documents it was made from, that of the consumed one first; () for the
             first pass.
    """

    pass_name: str
    options: tuple[PassOption, ...]
    seed: int
    qpa_version: str
    parents: tuple[str, ...]

    @property
    def parent(self) -> str | None:
        """Return the digest of the document the pass consumed; None for the first pass."""
        return self.parents[0] if self.parents else None

    @property
    def option_values(self) -> dict[str, OptionValue]:
        """Return the values of the pass's options by their names."""
        return {option.name: option.value for option in self.options}


def with_parents(content: JsonObject) -> JsonObject:
    """Return the content of a document from the time when a document named only one of its parents."""
    provenance = content["provenance"]
    if not isinstance(provenance, dict):
        raise TypeError("provenance is an object")
    parent = provenance.pop("parent")
    return content | {"provenance": provenance | {"parents": [] if parent is None else [parent]}}


class Document(Record):
    """One stage of the IR.

    `upgrades[i]` turns a document of schema version i+1 into version i+2, so the newest version is
    `len(upgrades) + 1`: readers accept every older version, the writer emits the newest.

    Source:  ours.
    """

    kind: ClassVar[str]
    upgrades: ClassVar[tuple[Callable[[JsonObject], JsonObject], ...]] = ()

    provenance: Provenance

    @classmethod
    def file_name(cls) -> str:
        """Return the name of this document's file in a run directory."""
        return f"{cls.kind}.json"

    @classmethod
    def schema_version(cls) -> int:
        """Return the schema version the writer emits."""
        return len(cls.upgrades) + 1

    @property
    def digest(self) -> str:
        """Return "sha256:" and the SHA-256 of the canonical JSON without the digest itself."""
        return digest_of(self._content())

    def to_json(self) -> bytes:
        """Return the document file: sorted keys, indented, with schema and digest."""
        content = self._content()
        content["digest"] = digest_of(content)
        return (json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_json(cls, text: bytes, subject: str) -> Self:
        """Read a document file of this or an older schema version.

        Args:    text: the file's bytes.
                 subject: the file's name, for error messages.
        Raises:  DocumentError: the text is no JSON object, or is of another kind or a newer schema; its
                 digest does not match the content; or its fields break the document's invariants.
        """
        content = _parse(text, subject)
        version = _schema_version(content, cls.kind, cls.schema_version(), subject)
        claimed = content.pop("digest", None)
        if claimed != digest_of(content):
            raise DocumentError(
                subject,
                f"digest {str(claimed)[:80]}",
                f"{digest_of(content)}: the file was edited or damaged",
                "run the pass again instead of editing its result",
            )
        del content["schema"]
        content = cls._upgraded(content, version, subject)
        try:
            return cls.model_validate_json(json.dumps(content))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "document"
            raise DocumentError(
                subject, f"a valid {cls.kind} document", f"{where}: {first['msg']}"
            ) from error

    @classmethod
    def _upgraded(cls, content: JsonObject, version: int, subject: str) -> JsonObject:
        """Return the content in the newest schema; an upgrade relies on the fields of the older schema."""
        try:
            for upgrade in cls.upgrades[version - 1 :]:
                content = upgrade(content)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            missing = isinstance(error, KeyError)
            found = f"{error.args[0]}: Field required" if missing else f"{type(error).__name__}: {error}"
            expected = f"a valid {cls.kind} document"
            raise DocumentError(subject, expected, " ".join(found.split())[:200]) from error
        return content

    def _content(self) -> JsonObject:
        content: JsonObject = self.model_dump(mode="json")
        content["schema"] = f"qpa.{self.kind}/{self.schema_version()}"
        return content


def unchanged(content: JsonObject) -> JsonObject:
    """Return content as it is: the upgrade to a version whose new fields have values for older documents."""
    return content


def digest_of(content: JsonObject) -> str:
    """Return the digest of a JSON object: SHA-256 of its compact canonical form."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def json_text(content: Mapping[str, object]) -> bytes:
    """Return a JSON object as people read it: indented, sorted keys, in UTF-8, one line feed at the end."""
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _parse(text: bytes, subject: str) -> JsonObject:
    try:
        content = json.loads(text)
        json.dumps(content, ensure_ascii=False).encode()  # half of a surrogate pair has no UTF-8
    except UnicodeEncodeError as error:
        raise DocumentError(subject, "a JSON document", "half of a surrogate pair in a string") from error
    except (ValueError, RecursionError) as error:
        raise DocumentError(subject, "a JSON document", f"{type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise DocumentError(subject, "a JSON object", type(content).__name__)
    return content


def _schema_version(content: JsonObject, kind: str, newest: int, subject: str) -> int:
    schema = content.get("schema")
    name, _, version = str(schema).partition("/")
    if name != f"qpa.{kind}" or not version.isdecimal() or len(version) > 9 or int(version) < 1:
        raise DocumentError(subject, f"schema qpa.{kind}/1 to /{newest}", str(schema)[:80])
    if int(version) > newest:
        raise DocumentError(
            subject,
            f"schema qpa.{kind}/{newest} or older",
            str(schema)[:80],
            "the document was made by a newer qpa: upgrade this one",
        )
    return int(version)

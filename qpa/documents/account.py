"""What a generator costs, in trained numbers, beside the adapter that it generates."""

from __future__ import annotations

from qpa.documents.base import JsonObject, Record


class ParameterAccount(Record):
    """The trained numbers of the generator against those of the adapter it generates.

    Args:    n_angles: angles of all circuits.
             n_control: the numbers that a control trains in the circuits' place.
             n_program: of the network that programs angles, or a control's numbers, from a context, and of
             the contexts that are trained with it.
             n_decoder: weights and biases of all groups' decoders.
             n_own: numbers, other than angles, of tensors that come without chunks.
             n_adapter: m, the trainable numbers of the same adapter without a generator.
    """

    n_angles: int
    n_control: int
    n_program: int
    n_decoder: int
    n_own: int
    n_adapter: int

    @property
    def n_generator(self) -> int:
        """Return all trained numbers of the generator."""
        return self.n_angles + self.n_control + self.n_program + self.n_decoder + self.n_own

    @property
    def trained(self) -> tuple[tuple[str, int], ...]:
        """Return what the generator trains, in words, and how many numbers; together they are all of them.

        A control, a program and own numbers are named only where there are some, and angles and decoders
        also where nothing replaces them.
        """
        replaced = {"circuit angles": self.n_control or self.n_own, "decoder": self.n_own}
        parts = (
            ("circuit angles", self.n_angles),
            ("control", self.n_control),
            ("program of contexts", self.n_program),
            ("decoder", self.n_decoder),
            ("own numbers", self.n_own),
        )
        return tuple((words, n) for words, n in parts if n or not replaced.get(words, 1))

    @property
    def percent(self) -> float:
        """Return the generator's size in percent of the adapter's."""
        return 100.0 * self.n_generator / self.n_adapter


def with_control_account(content: JsonObject) -> JsonObject:
    """Return the content of a document from the time when an account had no field for a control's numbers."""
    return _with_none_of(content, "n_control")


def with_own_account(content: JsonObject) -> JsonObject:
    """Return the content of a document from the time when every tensor came in chunks, for all data alike."""
    return _with_none_of(content, "n_own", "n_program")


def _with_none_of(content: JsonObject, *fields: str) -> JsonObject:
    account = content["account"]
    if not isinstance(account, dict):
        raise TypeError("an account is an object")
    return content | {"account": account | dict.fromkeys(fields, 0)}

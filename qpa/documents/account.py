"""What a generator costs, in trained numbers, beside the adapter that it generates."""

from __future__ import annotations

from qpa.documents.base import Record


class ParameterAccount(Record):
    """Trainable numbers of the generator against those of the adapter it generates.

    Args:    n_angles: trained numbers of the features: n_circuits * n_layers * n_qubits circuit angles,
             or what a control has in their place.
             n_decoder: decoder weights and biases of all groups.
             n_adapter: m, the trainable numbers of the same adapter without a generator.
    """

    n_angles: int
    n_decoder: int
    n_adapter: int

    @property
    def n_generator(self) -> int:
        """Return all trainable numbers of the generator."""
        return self.n_angles + self.n_decoder

    @property
    def percent(self) -> float:
        """Return the generator's size in percent of the adapter's."""
        return 100.0 * self.n_generator / self.n_adapter

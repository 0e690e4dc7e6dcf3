"""A model whose adapter is generated: the adapter on it, and the optimizer that holds the generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qpa.adapters.attach import adapter_parameters, attach_adapter
from qpa.adapters.parameter_view import AdapterParameter, leaf_of
from qpa.documents import AdapterSpec
from qpa.generators.chunks import basis_shapes, kept_rows
from qpa.generators.generator import Bases, Generator
from qpa.training.calibration import column_bases, gradient_bases
from qpa.training.optimizer import GeneratedAdapterOptimizer


@dataclass(frozen=True)
class GeneratedAdapter:
    """A model, its adapter and the adapter's generator, ready to train.

    Args:    model: as `qpa.adapters.attach.attach_adapter` returns it.
             parameters: of the adapter, by path.
             given: initial values that the base model or the parent gave, float32 on the CPU, by path.
             optimizer: trains the generator, and sets the adapter to what it generates.
    """

    model: Any
    parameters: dict[str, AdapterParameter]
    given: dict[str, Tensor]
    optimizer: GeneratedAdapterOptimizer

    @property
    def generator(self) -> Generator:
        """Return the generator."""
        return self.optimizer.generator

    def calibrate(self, spec: AdapterSpec, loss: Callable[[Any], Tensor], batches: Sequence[Any]) -> None:
        """Give the generator's spectra the directions of the loss's gradient, see `gradient_bases`.

        Args:    loss: of the model on a batch.
        Raises:  DivergedError: the gradient is not finite.
        """
        layout = self.generator.layout
        if spec.parent is None:
            bases = gradient_bases(self.parameters, spec, basis_shapes(layout), loss, batches)
        else:
            bases = column_bases(self.parameters, spec, layout, loss, batches)
        self.take_bases(bases)

    def take_bases(self, bases: Bases) -> None:
        """Give the generator's spectra their directions, in all processes."""
        self.generator.set_bases(bases)
        self.optimizer.push_forward()
        self.optimizer.share_all()


def attach_generator(
    model: Any,
    spec: AdapterSpec,
    generator: Generator,
    parent: Mapping[str, Tensor] | None = None,
    **settings: Any,
) -> GeneratedAdapter:
    """Put an adapter on a model, and a generator of it into an optimizer.

    Args:    model: of transformers, on the device to train on; changed in place.
             generator: of a layout of this adapter.
             parent: the tensors of the spec's parent, by path, where it has one.
             settings: `lr`, `angle_lr` and others of `GeneratedAdapterOptimizer`.
    Raises:  ModelError: the adapter does not fit the model.
    """
    layout = generator.layout
    wrapped = attach_adapter(model, spec, kept_rows(layout), parent)
    parameters = adapter_parameters(wrapped, spec)
    given = {t.path: parameters[t.path].detach().cpu().clone() for t in spec.given}
    for tensor in layout.kept:
        leaf_of(parameters[tensor.path]).requires_grad_(False)  # clipping must not see it
    adapter = [parameters[tensor.path] for tensor in layout.tensors]
    optimizer = GeneratedAdapterOptimizer(adapter, generator, **settings)
    return GeneratedAdapter(wrapped, parameters, given, optimizer)

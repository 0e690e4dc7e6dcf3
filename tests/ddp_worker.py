"""Train a generated adapter, alone or as one of several gloo processes; run by test_optimizer_ddp.

python ddp_worker.py <model> <meeting file> <rank> <n_ranks> <adapter file>
"""

import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from qpa.adapters.attach import adapter_parameters, attach_adapter
from qpa.documents import AdapterSpec, WeightLayout
from qpa.generators.chunks import basis_shapes, kept_rows
from qpa.generators.generator import make_generator
from qpa.models.base_model import load_model
from qpa.passes.inspect_model import InspectModel
from qpa.passes.plan_layout import PlanLayout
from qpa.pipeline.pass_protocol import PassContext
from qpa.pipeline.pipeline import Pipeline
from qpa.store.run_directory import DirectoryStore
from qpa.training.optimizer import GeneratedAdapterOptimizer

N_STEPS = 3
N_ROWS = 4


def plan_adapter(model, **layout):
    context = PassContext(seed=3, files=DirectoryStore(Path("nowhere")))
    options = {"circuits": 2, "layers": 2, **layout}
    pipeline = Pipeline(InspectModel(model=str(model), rank=2), PlanLayout(**options))
    after = pipeline.run(None, context)
    return after.document(AdapterSpec), after.document(WeightLayout)


def random_bases(layout):
    """Return orthonormal directions in place of the gradient's, where the layout has spectra."""
    random = torch.Generator().manual_seed(6)
    bases = {}
    for path, shape in basis_shapes(layout).items():
        n = min(shape)
        directions = torch.linalg.qr(torch.randn(max(shape), n, generator=random))[0]
        bases[path] = directions if shape[1] == n else directions.T
    return bases


def training_rows():
    random = torch.Generator().manual_seed(5)
    return torch.randint(1, 256, (N_ROWS, 12), generator=random)


def train(model, rank=0, n_ranks=1):
    """Take `N_STEPS` steps over this rank's rows; return the adapter's tensors by path."""
    spec, layout = plan_adapter(model)
    peft_model = attach_adapter(load_model(spec.base, keep_dtype=False), spec, kept_rows(layout))
    parameters = adapter_parameters(peft_model, spec)
    adapter = [parameters[tensor.path] for tensor in layout.tensors]
    generator = make_generator(layout, 3, random_bases(layout))
    optimizer = GeneratedAdapterOptimizer(adapter, generator, lr=0.02, angle_lr=0.04, eps=1e-4)
    replica = DistributedDataParallel(peft_model) if n_ranks > 1 else peft_model
    rows = training_rows()[rank::n_ranks]
    for _ in range(N_STEPS):
        optimizer.zero_grad()
        replica(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
    return {path: parameter.detach().clone() for path, parameter in parameters.items()}


def main():
    model, meeting, rank, n_ranks, adapter = sys.argv[1:]
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=int(n_ranks)
    )
    torch.save(train(Path(model), int(rank), int(n_ranks)), adapter)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

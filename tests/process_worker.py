"""Train some runs as one of several processes; run by test_processes.

python process_worker.py <jobs.json>    with the environment that a launcher gives

The first process trains each job, {"run": directory, "options": of train-generator}; the others follow. In a
run whose path has the word "ended", process 1 gets SIGTERM in its fourth step.
"""

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import torch

from qpa.documents import LogicalCircuit
from qpa.passes import training_pipeline
from qpa.passes.train_generator import TrainGenerator, follow
from qpa.pipeline.pass_protocol import PassContext
from qpa.store.run_directory import RunDirectory
from qpa.termination import Terminated
from qpa.training import processes
from qpa.training.generator_callback import GeneratorCallback


def end_some(on_step_begin):
    def wrapped(self, args, state, control, **rest):
        if "ended" in str(self.root) and self.processes.rank == 1 and state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        on_step_begin(self, args, state, control, **rest)

    return wrapped


def train(job):
    run = RunDirectory(Path(job["run"]))
    documents = run.read_through(LogicalCircuit)
    context = PassContext(0, run.files, documents)
    with suppress(Terminated):
        training_pipeline(TrainGenerator(**job["options"])).run(documents[-1], context, run.write)


def main():
    torch.set_num_threads(1)
    GeneratorCallback.on_step_begin = end_some(GeneratorCallback.on_step_begin)
    is_done = False
    for job in [] if processes.is_follower() else json.loads(Path(sys.argv[1]).read_text()):
        train(job)
    while processes.is_follower() and not is_done:
        with suppress(Terminated):
            follow()
            is_done = True
    processes.leave()


if __name__ == "__main__":
    main()

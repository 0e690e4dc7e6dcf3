"""What the demonstration showed, in one table.

    python -m demo.table runs/demo

`make demo` builds a small base model (`demo.build_model`) and texts (`demo.texts`), adapts the model to
telegrams with `qpa run demo/telegrams.yaml`, and ends with this table. Exit code 0 only when the adapted loss
is below the base loss and PEFT and transformers continue the prompt with the live model's own tokens.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qpa.documents import EngineCheck, FrozenAdapter
from qpa.documents.trained_generator import perplexity_text
from qpa.documents.verification import read_verification
from qpa.exporters.directory import PROBE_FILE
from qpa.store.run_directory import REPORT, RunDirectory

Rows = list[tuple[str, str]]
Tokens = tuple[int, ...]


def main() -> int:
    """Print the table of the run that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(description="Print what the demonstration showed.")
    parser.add_argument("run", type=Path)
    run = RunDirectory.open(parser.parse_args().run)
    frozen, export = run.read(FrozenAdapter), run.path / "exports" / "lora"
    verification = read_verification(export)
    checks = verification.engines if verification else ()
    prompt, live = read_probe(export / PROBE_FILE)
    rows, passed = summary(frozen, prompt, live, checks)
    print_table([*rows, ("page to look at", str(run.path / REPORT))])
    return 0 if passed else 1


def summary(
    frozen: FrozenAdapter, prompt: Tokens, live: Tokens, checks: tuple[EngineCheck, ...]
) -> tuple[Rows, bool]:
    """Return the table's rows, and whether everything the demonstration claims is so.

    Args:    prompt, live: of the probe, and how the model in training continued it.
             checks: how the engines did.
    """
    account, result = frozen.account, frozen.result
    tokens = {"live model": live} | {check.engine: check.greedy_tokens for check in checks}
    is_same = {"peft", "transformers"} <= tokens.keys() and len(set(tokens.values())) == 1
    is_better = result.eval_loss < result.base_loss
    rows = [
        ("base loss, perplexity", f"{result.base_loss:.3f}  {perplexity_text(result.base_loss)}"),
        ("adapted loss, perplexity", f"{result.eval_loss:.3f}  {perplexity_text(result.eval_loss)}"),
        ("LoRA's parameters", f"{account.n_adapter:,}"),
        ("the generator's", f"{account.n_generator:,}  ({account.percent:.1f} %)"),
        ("prompt", text_of(prompt, frozen)),
        *((f"greedy, {reader}", text_of(ids, frozen)) for reader, ids in tokens.items()),
        ("the same tokens", "yes" if is_same else "NO"),
    ]
    return rows, is_same and is_better


def read_probe(path: Path) -> tuple[Tokens, Tokens]:
    """Return the exported probe's prompt, and how the model in training continued it."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as reader:
        prompt, greedy = (tuple(reader.get_tensor(name).tolist()) for name in ("input_ids", "greedy"))
    return prompt, greedy


def text_of(tokens: Tokens, frozen: FrozenAdapter) -> str:
    """Return tokens of the base model as text on one line."""
    from tokenizers import Tokenizer

    path = Path(frozen.base.name_or_path, "tokenizer.json")
    text: str = Tokenizer.from_file(str(path)).decode(list(tokens))
    return text.strip().replace("\n", " / ")


def print_table(rows: Rows) -> None:
    """Print rows of a name and a value."""
    width = max(len(name) for name, _ in rows)
    print("\nA diary's model, adapted to telegrams (losses in nats per token, on held-out telegrams)\n")
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


if __name__ == "__main__":
    sys.exit(main())

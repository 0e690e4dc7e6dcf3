"""qpa targets: every device that can be named, with its size and its errors."""

from __future__ import annotations

from qpa.cli.command import Command
from qpa.cli.output import JsonOption, print_json, print_table

EXAMPLES = """
[bold]Examples[/bold]

qpa targets

qpa plan --model ./models/stories260K --device-target fake_torino --out runs/bard
"""


def targets(json_: JsonOption = False) -> None:
    """List the devices that --device-target takes."""
    from qpa.circuits.targets import list_devices
    from qpa.report.circuits import DEVICE_HEADER, device_json, device_rows

    devices = list_devices()
    if json_:
        print_json({"targets": [device_json(device) for device in devices]})
    else:
        print_table("targets; errors are medians over the device", device_rows(devices), DEVICE_HEADER)


COMMAND = Command(targets, EXAMPLES)

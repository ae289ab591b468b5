"""What a results file says of the machine it was made on."""

from __future__ import annotations

from typing import Any

import torch


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine_info.update(torch=torch.__version__, threads=torch.get_num_threads(), gpu=gpu)
    machine_info.pop("node", None)


def pytest_benchmark_update_json(
    config: Any, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """Leave out what only bloats a committed file."""
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)
    output_json["machine_info"]["cpu"].pop("flags", None)

"""How everything here is timed: warm-ups, repeats in alternating order, median and interquartile range."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "trl", "accelerate", "vllm", "liger-kernel", "deepspeed", "titans-pytorch")


def synchronize(device: str) -> None:
    """Wait for what runs on the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure(
    arms: Mapping[str, Callable[[], object]], *, warmups: int, repeats: int, device: str
) -> dict[str, dict[str, float]]:
    """Seconds of each arm. The order of the arms turns around with every repeat, so that drift hits all alike.

    Returns:
        median, low and high quartile in seconds of each arm; on a GPU also its peak memory in GiB, and how much of
        that came on top of what was there before (`pass_gib`): weights of all arms are there all the time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    peak, added = dict.fromkeys(arms, 0.0), dict.fromkeys(arms, 0.0)
    for repeat in range(warmups + repeats):
        for name in list(arms) if repeat % 2 == 0 else reversed(list(arms)):
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if device == "cuda" else 0
            synchronize(device)
            start = time.perf_counter()
            arms[name]()
            synchronize(device)
            if repeat >= warmups:
                seconds[name].append(time.perf_counter() - start)
                if device == "cuda":
                    highest = torch.cuda.max_memory_allocated()
                    peak[name] = max(peak[name], highest / 2**30)
                    added[name] = max(added[name], (highest - before) / 2**30)
    result = {}
    for name, values in seconds.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        result[name] = {"median": median, "low": low, "high": high, "repeats": len(values)}
        result[name] |= {"peak_gib": peak[name], "pass_gib": added[name]}
    return result


def environment(device: str) -> dict[str, str]:
    """Versions and machine, for the JSON."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["python"] = platform.python_version()
    found["device"] = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return found


def write_json(file: Path, content: object) -> None:
    """Results as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1, default=str) + "\n")

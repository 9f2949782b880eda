"""Descriptions of NVIDIA GPUs for XLA's GPU compiler, which needs no GPU but has to be told about one."""

from collections.abc import Mapping
from typing import Any

# Source: openxla/xla, xla/backends/gpu/target_config/specs: a100_sxm_80, h100_sxm, h200 and b200 .txtpb, as read in
# November 2026; the driver and libraries are those named for the H100, for all four. Their tables of operations per
# clock, which no field here repeats, change nothing in a program that is compiled without tuning.
_ALL = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49152,
    "threads_per_core_limit": 2048,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "driver_version": "13.0.0",
    "runtime_version": "12.8.0",
    "compile_time_toolkit_version": "12.8.0",
    "dnn_version": "9.10.0",
}
# fmt: off
_EACH = {
    "a100": ("NVIDIA A100-SXM4-80GB", 8, {
        "core_count": 108, "fpus_per_core": 64, "clock_rate_ghz": 1.41, "shared_memory_per_core": 167936,
        "shared_memory_per_block_optin": 166912, "l2_cache_size": 41943040, "memory_bandwidth": 2039040000000,
        "device_memory_size": 85100068864,
    }),
    "h100": ("NVIDIA H100 80GB HBM3", 9, {
        "core_count": 132, "fpus_per_core": 128, "clock_rate_ghz": 1.98, "shared_memory_per_core": 233472,
        "shared_memory_per_block_optin": 232448, "l2_cache_size": 52428800, "memory_bandwidth": 3352320000000,
        "device_memory_size": 84942979072,
    }),
    "h200": ("NVIDIA H200 141GB HBM3e", 9, {
        "core_count": 132, "fpus_per_core": 128, "clock_rate_ghz": 1.98, "shared_memory_per_core": 233472,
        "shared_memory_per_block_optin": 232448, "l2_cache_size": 52428800, "memory_bandwidth": 4800000000000,
        "device_memory_size": 151397597184,
    }),
    "b200": ("NVIDIA B200", 10, {
        "core_count": 148, "fpus_per_core": 128, "clock_rate_ghz": 1.965, "shared_memory_per_core": 233472,
        "shared_memory_per_block_optin": 232448, "l2_cache_size": 132644864, "memory_bandwidth": 7672320000000,
        "device_memory_size": 191514411008,
    }),
}
# fmt: on


def gpu_facts(kind: str) -> dict[str, Any]:
    """The numbers of a GPU by XLA's names of them: bytes, bytes/s, GHz. kind: "a100", "h100", "h200" or "b200"."""
    return _ALL | _EACH[kind][2]


def target_config(kind: str) -> str:
    """The description of a GPU, a GpuTargetConfigProto as text, that XLA's GPU compiler takes.

    Args: kind: "a100", "h100", "h200" or "b200", all SXM.
    Example:
      >>> target_config("h200").splitlines()[-1]
      'device_description_str: "NVIDIA H200 141GB HBM3e"'
    """
    name, capability, _ = _EACH[kind]
    major, minor, patch = map(int, _ALL["dnn_version"].split("."))
    # The instructions of one architecture alone ("sm_90a"), which the fastest products of Hopper and later need.
    features = {"major": capability, "feature_extension": _Name("ACCELERATED_FEATURES" if capability >= 9 else "NONE")}
    fields = {
        "gpu_device_info": gpu_facts(kind) | {"cuda_compute_capability": features, "name": name},
        "platform_name": "CUDA",
        "dnn_version_info": {"major": major, "minor": minor, "patch": patch},
        "device_description_str": name,
    }
    return "\n".join(_text(fields))


class _Name(str):
    """A name of the format itself, which is not quoted."""


def _text(fields: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, value in fields.items():
        if isinstance(value, Mapping):
            lines += [f"{name} {{", *(f"  {line}" for line in _text(value)), "}"]
        elif isinstance(value, str) and not isinstance(value, _Name):
            lines.append(f'{name}: "{value}"')
        else:
            lines.append(f"{name}: {value}")
    return lines

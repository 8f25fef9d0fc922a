"""What a network costs."""

from companion.metrics.activations import activation_bytes
from companion.metrics.complexity import (
    Complexity,
    Cost,
    UncountedWarning,
    count_complexity,
    count_flops,
    count_macs,
    count_parameters,
    model_bytes,
)
from companion.metrics.energy import Energy, Estimate, NvmlReader, RaplReader, Reader, energy_reader, measure_energy
from companion.metrics.instructions import count_instructions
from companion.metrics.latency import (
    Comparison,
    Latency,
    Ratio,
    Throughput,
    compare_latency,
    inference,
    measure_latency,
    measure_throughput,
    training_step,
)
from companion.metrics.memory import Memory, measure_memory
from companion.metrics.onnx_complexity import OnnxComplexity, count_onnx
from companion.metrics.roofline import ACCELERATORS, Layer, Roof, Roofline, measure_roof, measure_roofline
from companion.metrics.trade_offs import pareto_front

__all__ = [
    "ACCELERATORS",
    "Comparison",
    "Complexity",
    "Cost",
    "Energy",
    "Estimate",
    "Latency",
    "Layer",
    "Memory",
    "NvmlReader",
    "OnnxComplexity",
    "RaplReader",
    "Ratio",
    "Reader",
    "Roof",
    "Roofline",
    "Throughput",
    "UncountedWarning",
    "activation_bytes",
    "compare_latency",
    "count_complexity",
    "count_flops",
    "count_instructions",
    "count_macs",
    "count_onnx",
    "count_parameters",
    "energy_reader",
    "inference",
    "measure_energy",
    "measure_latency",
    "measure_memory",
    "measure_roof",
    "measure_roofline",
    "measure_throughput",
    "model_bytes",
    "pareto_front",
    "training_step",
]

"""`companion doctor`: what works on this machine, and what to type about the rest.

Each part is tried in a process of its own, so that one that crashes or hangs is a line in the report, not its end.
"""

import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import companion

TIMEOUT = 60.0  # seconds a part may take: a cold import of torch from a slow disk needs some


@dataclass(frozen=True)
class Part:
    """Something the course uses, how to try it, and how to get it."""

    name: str
    module: str
    purpose: str
    install: str
    trial: str
    """Python that does a little real work and prints what is worth knowing."""


def _extra(name: str) -> str:
    return f'pip install -c constraints.txt -e ".[{name}]"'


# Where there is no GPU that it could run on, it builds engines for other machines.
_TENSORRT = """
import {0} as trt; from companion.engines.tensorrt.library import gpu
trt.Builder(trt.Logger(trt.Logger.ERROR)); print(trt.__version__, gpu() or "builds only: there is no NVIDIA GPU here")
"""
_CORE = "pip install -c constraints.txt -e ."
PARTS = (
    Part(
        "PyTorch, torchvision",
        "torchvision",
        "networks and training",
        _CORE,
        # A compiled operator of torchvision: mismatched builds of the two import well and fail here.
        "import torch, torchvision as v; v.ops.nms(torch.rand(1, 4), torch.rand(1), 0.5); "
        "print(torch.__version__, v.__version__)",
    ),
    Part(
        "ONNX Runtime",
        "onnxruntime",
        "the default inference engine",
        _CORE,
        "import onnxruntime as o; print(o.__version__, *o.get_available_providers())",
    ),
    Part(
        "OpenVINO",
        "openvino",
        "inference engine for CPUs",
        _extra("openvino"),
        # Without the package by which OpenVINO reports its import to its maker.
        "import sys; sys.modules['openvino_telemetry'] = None; "
        "import openvino as o; print(o.__version__, *o.Core().available_devices)",
    ),
    Part(
        "LiteRT",
        "ai_edge_litert",
        "inference engine for phones",
        _extra("litert"),
        "from importlib.metadata import version; import ai_edge_litert.interpreter; print(version('ai-edge-litert'))",
    ),
    Part(
        "TensorRT for RTX",
        "tensorrt_rtx",
        "inference engine for NVIDIA RTX GPUs",
        _extra("tensorrt"),
        _TENSORRT.format("tensorrt_rtx"),
    ),
    Part(
        "TensorRT",
        "tensorrt",
        "inference engine for NVIDIA GPUs",
        'pip install -e ".[gpu]"',
        _TENSORRT.format("tensorrt"),
    ),
    Part(
        "PyCUDA",
        "pycuda",
        "GPU memory for TensorRT",
        'pip install -e ".[gpu]"',
        "import pycuda, pycuda.driver as d; d.init(); print(pycuda.VERSION_TEXT, d.Device.count(), 'GPU(s)')",
    ),
    Part(
        "Horovod",
        "horovod",
        "distributed training (2.2.3)",
        "make horovod (compiles it on Linux, some minutes; into another environment: python tools/build_horovod.py)",
        "import horovod, horovod.torch as h; h.init(); print(horovod.__version__)",
    ),
    Part(
        "FastAPI and uvicorn",
        "fastapi",
        "servers",
        _extra("serve"),
        "import fastapi, uvicorn; print(fastapi.__version__, uvicorn.__version__)",
    ),
    Part(
        "OpenCV",
        "cv2",
        "pictures and video for detection",
        _extra("detect"),
        "import cv2; print(cv2.__version__)",
    ),
    Part(
        "JupyterLab",
        "jupyterlab",
        "the notebooks",
        _extra("notebooks"),
        "import jupyterlab; print(jupyterlab.__version__)",
    ),
    Part(
        "nbval",
        "nbval",
        "checks of the notebooks",
        _extra("notebooks"),
        "from importlib.metadata import version; import nbval; print(version('nbval'))",
    ),
    Part(
        "Jupyter Book",
        "jupyter_book",
        "the course site",
        _extra("site"),
        "import jupyter_book.sphinx; print(jupyter_book.__version__)",
    ),
)


@dataclass(frozen=True)
class Finding:
    """How a part fared."""

    name: str
    state: str
    """``works``, ``missing`` or ``broken``."""
    detail: str
    """Its version and the like, or why it is broken."""
    advice: str
    """What to type; empty if it works."""


def examine(part: Part) -> Finding:
    """Try one part in a process of its own."""
    if find_spec(part.module) is None:
        return Finding(part.name, "missing", part.purpose, part.install)
    ok, output = _run(part.trial)
    return Finding(part.name, "works" if ok else "broken", output, "" if ok else part.install)


def _run(code: str) -> tuple[bool, str]:
    """Whether a Python program ended well; what it printed, or the last line of its complaint."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return False, f"no answer in {TIMEOUT:.0f} s"
    lines = [line for line in (done.stderr if done.returncode else done.stdout).splitlines() if line.strip()]
    last = lines[-1].strip() if lines else ""
    if done.returncode < 0:
        return False, f"crashed with signal {-done.returncode}"
    return done.returncode == 0, last


# Only what changes what the course shows: vector width, and instructions for int8 and bfloat16.
_CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16")

_TORCH_REPORT = """
import json, torch
from companion.errors import CompanionError
from companion.train.amp import PRECISIONS, Precision

def state(name):
    try:
        return Precision.named(name, "cuda" if gpus else "cpu").advice or ("works" if name == "fp32" else "fast")
    except CompanionError:
        return "needs a GPU"

gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({
    "threads": torch.get_num_threads(),
    "accelerators": [f"cuda:{i} {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for i, gpu in enumerate(gpus)]
    + (["mps"] if torch.backends.mps.is_available() else []),
    "precisions": {name: state(name) for name in PRECISIONS},
}))
"""


def _cpu() -> dict[str, Any]:
    """Model, cores and features of the CPU; what the system does not tell is left empty."""
    model, flags = platform.processor(), set[str]()
    info = Path("/proc/cpuinfo")  # Linux
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = (part.strip() for part in line.partition(":"))
            if key in ("flags", "Features"):
                flags = set(value.split())
            elif key == "model name":
                model = value
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"model": model, "cores": cores, "features": [name for name in _CPU_FEATURES if name in flags]}


def report() -> dict[str, Any]:
    """Everything `companion doctor` knows, as plain values."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        torch_report = pool.submit(_run, _TORCH_REPORT)
        findings = list(pool.map(examine, PARTS))
    ok, text = torch_report.result()
    torch = json.loads(text) if ok else {"threads": None, "accelerators": [], "precisions": {}}
    return {
        "companion": companion.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu(),
        "threads": torch["threads"],
        "accelerators": torch["accelerators"],
        "precisions": torch["precisions"],
        "parts": [asdict(finding) for finding in findings],
    }

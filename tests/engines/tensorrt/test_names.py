"""Every name of TensorRT that our code uses exists, in TensorRT for RTX and in TensorRT 11.

TensorRT's bindings want its libraries, which are large and need a GPU's driver. Nine empty functions in their place
are enough to import the bindings and look at them.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from companion.engines import tensorrt
from companion.engines.tensorrt import memory

# memory.py speaks to other packages, of which test_memory.py knows.
SOURCES = sorted(set(Path(tensorrt.__file__).parent.glob("*.py")) - {Path(memory.__file__)})

# How variables are called that hold objects of the library; a leading underscore or `self.` changes nothing.
CLASSES = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "definition": "INetworkDefinition",
    "engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "layer": "ILayer",
    "parser": "OnnxParser",
    "parser_error": "ParserError",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "tensor": "ITensor",
}


def used():
    """``trt.A.B`` as A.B, members of the objects above as Class.member; and the ones asked for by `hasattr`."""
    names, optional = set(), set()
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr":
                owner = CLASSES.get(_last(node.args[0]))
                optional |= {f"{owner}.{node.args[1].value}"} if owner else set()
            if not isinstance(node, ast.Attribute):
                continue
            chain = _chain(node)
            if chain[0] in ("trt", "library()"):
                names.add(".".join(chain[1:]))
            elif (owner := CLASSES.get(_last(node.value))) is not None:
                names.add(f"{owner}.{node.attr}")
    return names, optional


def _chain(node):
    """The names in a.b.c; of what is no name, its source."""
    if isinstance(node, ast.Attribute):
        return [*_chain(node.value), node.attr]
    return [node.id if isinstance(node, ast.Name) else ast.unparse(node)]


def _last(node):
    return _chain(node)[-1].removeprefix("_")


NAMES, OPTIONAL = used()

PROBE = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
found = {}
for name in json.load(sys.stdin):
    part = module
    for step in name.split("."):
        part = getattr(part, step, None)
    found[name] = part is not None
print(json.dumps([module.__version__, found]))
"""


def probe(module, **environment):
    """Which of the names a module has, looked up in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, module],
        input=json.dumps(sorted(NAMES | OPTIONAL)),
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_names_are_found_in_our_source():
    assert NAMES >= {  # noqa: SIM300
        "Builder",
        "BuilderFlag.TF32",
        "MemoryPoolType.WORKSPACE",
        "OnnxParser",
        "OnnxParser.parse",
        "IBuilderConfig.add_optimization_profile",
        "IExecutionContext.execute_async_v3",
        "ICudaEngine.get_tensor_profile_shape",
        "Runtime.deserialize_cuda_engine",
        "TensorIOMode.INPUT",
    }
    assert OPTIONAL == {  # noqa: SIM300
        "IBuilderConfig.set_compute_capability",
        "Runtime.get_engine_validity",
    }


def test_tensorrt_for_rtx_has_them_all():
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    _, found = probe("tensorrt_rtx")
    assert [name for name, there in found.items() if not there] == []


# What only TensorRT for RTX has, and is used only after one of the optional names was found.
OF_RTX = {
    "ComputeCapability",
    "EngineInvalidityDiagnostics",
    "EngineValidity",
    "EngineValidity.INVALID",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "Runtime.get_engine_validity",
}

SYMBOLS = {
    "nvinfer": [
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
    ],
    "nvinfer_plugin": ["initLibNvInferPlugins"],
    "nvonnxparser": ["createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion"],
}


def test_tensorrt_11_has_the_others(tmp_path):
    bindings = find_spec("tensorrt_bindings")
    compiler = shutil.which("cc")
    if bindings is None or compiler is None or sys.platform != "linux":
        pytest.skip("needs TensorRT's bindings (tensorrt-cu13-bindings), a C compiler and Linux")
    for name, symbols in SYMBOLS.items():
        source = tmp_path / f"{name}.c"
        source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in symbols))
        library = f"lib{name}.so.11"
        flags = ["-shared", "-fPIC", f"-Wl,-soname,{library}"]
        subprocess.run([compiler, *flags, "-o", tmp_path / library, source], check=True)
    version, found = probe("tensorrt_bindings", LD_LIBRARY_PATH=str(tmp_path))
    assert version.startswith("11.")
    assert {name for name, there in found.items() if not there} == OF_RTX

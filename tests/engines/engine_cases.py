"""What the tests of the engines share: networks, engines, and how to ask them."""

import re
from importlib.util import find_spec

import torch
from torchvision.models import MobileNetV2

from companion import engines

OURS = ["simple_cnn", "simple_cnn_3conv", "cifar_resnet20", "unet"]
NETWORKS = [*OURS, "mobilenet"]
# Those that run networks, at float32. (LiteRT, which runs converted files only, has tests of its own.)
ENGINES = ["onnxruntime", *(["openvino"] if find_spec("openvino") else []), "torch", "torch_fused"]
FROM_FILES = ("onnxruntime", "openvino")


def small_mobilenet():
    """Somebody else's network: depthwise convolutions, ReLU6, dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MobileNetV2(width_mult=0.5, inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2]], num_classes=10)


def lively(model, side=32):
    """The network in training mode, with normalisations that do something: as after some training."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for norm in norms:
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
            torch.nn.init.normal_(norm.bias, std=0.2)
            norm.momentum = 1.0  # so that one batch decides the averages
        model.train()(torch.rand(8, 3, side, side))
    for norm in norms:
        norm.momentum = 0.1
    return model


def start(found, engine, **options):
    if engine in FROM_FILES:
        return engines.load(found.path, engine, **options)
    return engines.load(found.model, engine, example=found.example, **options)


class Does(torch.nn.Module):
    """A network that is one function."""

    def __init__(self, forward):
        super().__init__()
        self.forward = forward


def torch_answer(model, *inputs):
    """What the network itself says in evaluation mode; its mode is put back."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            return model.eval()(*inputs)
    finally:
        for module, training in modes.items():
            module.training = training


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    assert not re.search(r"[.!?]\s+[A-Z]", text), text
    assert "[ONNXRuntimeError]" not in text
    return text

"""Networks for the tests of channel pruning, and what they should do without some channels."""

import copy
import functools

import numpy as np
import torch
import torchvision
from torch import nn

TORCHVISION = (
    *("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"),
    *("efficientnet_b0", "densenet121", "vgg11_bn", "vit_b_16"),
)


@functools.lru_cache(maxsize=2)  # tests that use one network run one after the other
def torchvision_network(name, *, full=False):
    """One of torchvision's with random weights, and the side of images for it; shared, so nobody may change it.

    It is small where the network allows, unless ``full``.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if full:
            return lively(getattr(torchvision.models, name)(), 224), 224
        if name == "vit_b_16":  # its 16×16 patches and 12 heads, in fewer and narrower layers
            network = torchvision.models.VisionTransformer(
                image_size=32, patch_size=16, num_layers=2, num_heads=12, hidden_dim=96, mlp_dim=384, num_classes=10
            )
            return lively(network, 32), 32
        network = getattr(torchvision.models, name)(num_classes=10)
        if name == "vgg11_bn":  # 7×7 pixels of 512 channels flattened, but not 4096 hidden units
            network.classifier[0], network.classifier[3] = nn.Linear(512 * 49, 96), nn.Linear(96, 64)
            network.classifier[6] = nn.Linear(64, 10)
        side = 32 if name in ("resnet50", "densenet121") else 64
        return lively(network, side), side


def images(side, count=2):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def lively(model, side=64):
    """The network in evaluation mode, with normalisations and biases that do something: as after some training."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)]
        for norm in norms:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
            norm.momentum = 1.0  # so that one batch decides the averages
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and not parameter.any():
                nn.init.normal_(parameter, std=0.05)
        for name, module in model.named_modules():
            if name == "heads.head":  # torchvision starts it at zero
                nn.init.normal_(module.weight, std=0.1)
        model.train()(images(side, 8))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def zeroed(model, graph, keep):
    """A copy of ``model`` in which every parameter of the groups that go is zero, by the graph's record."""
    twin = copy.deepcopy(model)
    for (layer, side), labels in graph.labels.items():
        module = twin.get_submodule(layer)
        gone = torch.tensor([label >= 0 and not keep[label] for label in labels.tolist()])
        transposed = isinstance(module, nn.ConvTranspose2d)
        with torch.no_grad():
            if side == "heads":
                heads, size = module.num_heads, module.head_dim
                module.in_proj_weight.view(3, heads, size, -1)[:, gone] = 0
                module.in_proj_bias.view(3, heads, size)[:, gone] = 0
                module.out_proj.weight.view(-1, heads, size)[:, gone] = 0
                continue
            if (side == "in") != transposed and side != "through":
                module.weight[:, gone] = 0
            else:
                module.weight[gone] = 0
            if side != "in" and module.bias is not None:
                module.bias[gone] = 0
    return twin


def group_of(graph, layer, side):
    """The groups of a layer's channels, as a list."""
    return graph.labels[layer, side].tolist()


def kept_by(graph, counts):
    """Keep the first so many groups of each width, by the width's name."""
    keep = np.ones(graph.groups, dtype=bool)
    for width in graph.widths:
        keep[list(width.groups)[counts.get(width.name, len(width.groups)) :]] = False
    return keep

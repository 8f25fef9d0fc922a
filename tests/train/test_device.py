"""Where a network computes, and in which layout its images lie."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from companion.train.device import placed

CPU = torch.device("cpu")


def network(channels, kernel=1, stride=2):
    torch.manual_seed(0)
    second = nn.Conv2d(channels, 7, kernel, stride=stride)
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), second, nn.Flatten(), nn.LazyLinear(2))


def is_channels_last(tensor):
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "plain"),
    [(5, 1, 2, True), (15, 1, 2, True), (16, 1, 2, False), (5, 3, 2, False), (5, 1, 1, False)],
)
def test_images_lie_channels_last_but_where_onednn_overruns(channels, kernel, stride, plain):
    net = network(channels, kernel, stride)
    image = torch.rand(4, 3, 8, 8)
    net(image).sum().backward()
    expected = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    seen, filters = [], []
    with placed(net, CPU):
        assert is_channels_last(net[0].weight)
        filters.append(net[1].weight.stride())
        # Behind the layer's own hooks.
        net[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        net(image.to(memory_format=torch.channels_last)).sum().backward()
    assert is_channels_last(seen[0]) is not plain
    if kernel == 1:  # of which only the strides tell the layout
        assert filters == [(channels, 1, 1, 1) if plain else (channels, 1, channels, channels)]
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    net(image.to(memory_format=torch.channels_last))
    assert is_channels_last(seen[1])  # as before: nothing stays behind


def test_training_a_narrow_shortcut_leaves_the_memory_whole():
    """On processors with AVX2 and no more, this ended in "free(): invalid pointer"."""
    script = """
        import torch
        from torch import nn
        from companion.train.device import placed

        torch.set_num_threads(1)
        for narrow in range(3, 9):
            net = nn.Sequential(nn.Conv2d(3, narrow, 3, padding=1), nn.Conv2d(narrow, 52, 1, stride=2))
            with placed(net, torch.device("cpu")):
                for size in (8, 16, 32) * 5:
                    x = torch.rand(32, 3, size, size).to(memory_format=torch.channels_last)
                    net(x).sum().backward()
    """
    found = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr

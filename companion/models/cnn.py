"""The two small convolutional networks of the chapter (2.3.2 and 2.2.3), corrected.

Against the printed listings: the images are flattened per image (`view(-1, …)` of a picture of another
size silently mixes the images of a batch), each activation is a module of its own and nothing works in
place, so that the network can be pruned, quantised and hooked; normalisation is part of the network.
"""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from companion.models.layers import Normalize


class SimpleCNN(nn.Sequential):
    """Convolution 3×3, ReLU, 2×2 max pooling, once per entry of ``channels``; then two linear layers.

    Takes float images [N, 3, image_size, image_size] in 0..1, returns logits [N, classes].
    """

    def __init__(
        self,
        *,
        channels: Sequence[int],
        hidden: int,
        image_size: int,
        classes: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        side = image_size // 2 ** len(channels)
        if side < 1:
            raise ValueError(f"images of {image_size} pixels are too small for {len(channels)} poolings")
        layers: OrderedDict[str, nn.Module] = OrderedDict(normalize=Normalize(mean, std))
        for i, (before, after) in enumerate(zip((3, *channels), channels, strict=False), start=1):
            layers[f"conv{i}"] = nn.Conv2d(before, after, kernel_size=3, padding=1)
            layers[f"relu{i}"] = nn.ReLU()
            layers[f"pool{i}"] = nn.MaxPool2d(2)
        layers["flatten"] = nn.Flatten()
        layers["fc1"] = nn.Linear(channels[-1] * side * side, hidden)
        layers[f"relu{len(channels) + 1}"] = nn.ReLU()
        layers["fc2"] = nn.Linear(hidden, classes)
        super().__init__(layers)

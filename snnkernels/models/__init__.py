"""Small networks for demos, tests and benchmarks, and their checkpoints.

Every network takes ``activation``, a callable without arguments that returns a fresh module, so
that the same layout trains with ReLU, a clipped ReLU or a staircase. Inputs are ``[B, C, H, W]``
floating-point tensors, outputs are logits ``[B, num_classes]`` of the parameters' dtype.
"""

from .checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from .networks import (
    ARCHITECTURES,
    VGG,
    BasicBlock,
    ResNet,
    SmallCNN,
    resnet10,
    resnet18,
    resnet20,
    small_cnn,
    vgg9,
    vgg11,
    vgg16,
)

__all__ = [
    "ARCHITECTURES",
    "VGG",
    "BasicBlock",
    "Checkpoint",
    "ResNet",
    "SmallCNN",
    "load_checkpoint",
    "resnet10",
    "resnet18",
    "resnet20",
    "save_checkpoint",
    "small_cnn",
    "vgg9",
    "vgg11",
    "vgg16",
]

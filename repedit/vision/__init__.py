"""Unlearning in image classifiers, where a model that never saw the images can always be trained beside the edited one."""

from repedit.vision.networks import small_cnn, small_mlp
from repedit.vision.sources import cifar6k, digits, mnist5k
from repedit.vision.splitting import class_splits, mislabelled_splits, random_splits
from repedit.vision.task import Images, ImageSplits, Task
from repedit.vision.training import train

__all__ = [
    "ImageSplits",
    "Images",
    "Task",
    "cifar6k",
    "class_splits",
    "digits",
    "mislabelled_splits",
    "mnist5k",
    "random_splits",
    "small_cnn",
    "small_mlp",
    "train",
]

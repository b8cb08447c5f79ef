"""Unlearning in image classifiers, where a model that never saw the images can always be trained beside the edited one."""

from repedit.vision.differences import apply
from repedit.vision.networks import small_cnn, small_mlp
from repedit.vision.recipes import ascend, finetune, relabel, retrain
from repedit.vision.relabelling import Relabel
from repedit.vision.sources import cifar6k, digits, mnist5k
from repedit.vision.splitting import class_splits, mislabelled_splits, random_splits
from repedit.vision.task import Images, ImageSplits, Task
from repedit.vision.training import train, trained_on

__all__ = [
    "ImageSplits",
    "Images",
    "Relabel",
    "Task",
    "apply",
    "ascend",
    "cifar6k",
    "class_splits",
    "digits",
    "finetune",
    "mislabelled_splits",
    "mnist5k",
    "random_splits",
    "relabel",
    "retrain",
    "small_cnn",
    "small_mlp",
    "train",
    "trained_on",
]

"""Unlearning in image classifiers, where a model that never saw the images can always be trained beside the edited one."""

from repedit.vision.condensation import Condense
from repedit.vision.condensing import condense, condensed_model
from repedit.vision.differences import apply
from repedit.vision.distilling import salun, scrub
from repedit.vision.erasing import class_eraser, erase_class, zero_units
from repedit.vision.folding import fold
from repedit.vision.gan import Gan, GanConfig, train_gan
from repedit.vision.grouping import buckets
from repedit.vision.networks import small_cnn, small_mlp
from repedit.vision.places import hooked, statistics
from repedit.vision.recipes import ascend, finetune, relabel, retrain
from repedit.vision.relabelling import DataPlan, Relabel
from repedit.vision.schedule import PUBLISHED, Row, Schedule, overture, preparation, scheduled
from repedit.vision.sources import cifar6k, digits, mnist5k
from repedit.vision.splitting import class_splits, mislabelled_splits, random_splits
from repedit.vision.synthesis import Synthesize, multi_gan, train_gans
from repedit.vision.task import Images, ImageSplits, Task
from repedit.vision.training import train, trained_on

__all__ = [
    "PUBLISHED",
    "Condense",
    "DataPlan",
    "Gan",
    "GanConfig",
    "ImageSplits",
    "Images",
    "Relabel",
    "Row",
    "Schedule",
    "Synthesize",
    "Task",
    "apply",
    "ascend",
    "buckets",
    "cifar6k",
    "class_eraser",
    "class_splits",
    "condense",
    "condensed_model",
    "digits",
    "erase_class",
    "finetune",
    "fold",
    "hooked",
    "mislabelled_splits",
    "mnist5k",
    "multi_gan",
    "overture",
    "preparation",
    "random_splits",
    "relabel",
    "retrain",
    "salun",
    "scheduled",
    "scrub",
    "small_cnn",
    "small_mlp",
    "statistics",
    "train",
    "train_gan",
    "train_gans",
    "trained_on",
    "zero_units",
]

"""Unlearning in image classifiers, where a reference that never saw the forget images can always be trained for comparison."""

from repedit.vision.condensation import Condense, buckets, condense, condensed_model
from repedit.vision.data import (
    Images,
    ImageSplits,
    Task,
    cifar6k,
    class_splits,
    digits,
    mislabelled_splits,
    mnist5k,
    random_splits,
)
from repedit.vision.editing import apply, class_eraser, erase_class, fold, hooked, statistics, zero_units
from repedit.vision.recipes import (
    DataPlan,
    Gan,
    GanConfig,
    Relabel,
    Synthesize,
    ascend,
    finetune,
    multi_gan,
    relabel,
    retrain,
    salun,
    scrub,
    train_gan,
    train_gans,
)
from repedit.vision.training import (
    PUBLISHED_SCHEDULES,
    Schedule,
    Stage,
    alternating_schedule,
    offline_schedule,
    small_cnn,
    small_mlp,
    train,
    train_scheduled,
    trained_on,
)

__all__ = [
    "PUBLISHED_SCHEDULES", "Condense", "DataPlan", "Gan", "GanConfig", "ImageSplits", "Images", "Relabel", "Schedule",
    "Stage", "Synthesize", "Task", "alternating_schedule", "apply", "ascend", "buckets", "cifar6k", "class_eraser",
    "class_splits", "condense", "condensed_model", "digits", "erase_class", "finetune", "fold", "hooked",
    "mislabelled_splits", "mnist5k", "multi_gan", "offline_schedule", "random_splits", "relabel", "retrain", "salun",
    "scrub", "small_cnn", "small_mlp", "statistics", "train", "train_gan", "train_gans", "train_scheduled",
    "trained_on", "zero_units",
]  # fmt: skip

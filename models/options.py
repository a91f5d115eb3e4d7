"""Options of a task and the recipes it comes with. Imports neither torch nor ray, so that ``--help`` stays fast."""

from dataclasses import dataclass

__all__ = ["Recipe", "TaskOptions"]


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What a task is built from; every field has a value that works."""

    data: str = "synthetic"
    """``synthetic``, or ``KIND:PATH``; the task says which kinds it knows."""
    model: str | None = None
    """Name of the network, or None for the task's own default."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels of a training image, or None for the task's own default."""
    classes: tuple[str, ...] | None = None
    """Class names without background, in the order of their labels; None lets the data say."""
    split_train: str = "train"
    """Name of the ImageSets file that lists the training images (voc), or of the instances' split (coco)."""
    split_val: str = "val"
    """Name of the ImageSets file that lists the validation images (voc), or of the instances' split (coco)."""
    augment: str | None = None
    """Name of how training images are varied, or None for the network's own default."""
    recipe: str = "default"
    """Which of the task's recipes; it may change how images are scaled and augmented."""
    seed: int = 0
    """Seed of synthetic data; the initial weights are drawn by whoever calls ``build_model``."""
    image_cache: int = 0
    """MiB of decoded images that a process keeps."""
    synthetic_train: int = 512
    """Number of training images of the synthetic source."""
    synthetic_val: int = 64
    """Number of validation images of the synthetic source."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Training settings that belong together; a command-line option overrides a single one of them."""

    batch_size: int = 16
    """Global minibatch size."""
    epochs: int = 1
    """Passes over the training set when neither steps nor epochs are asked for."""
    optimizer: str = "sgd"
    """``sgd``, ``adam`` or ``adamw``."""
    lr: float = 0.01
    """Peak learning rate; never rescaled silently."""
    momentum: float = 0.0
    """SGD's momentum."""
    nesterov: bool = False
    """SGD's Nesterov momentum."""
    weight_decay: float = 0.0
    """L2 penalty (decoupled for adamw)."""
    schedule: str = "constant"
    """``constant``, ``step``, ``cosine`` or ``polynomial``."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly to its peak."""
    lr_factors: tuple[tuple[str, float], ...] = ()
    """Pairs of key pattern (``fnmatch``) and factor on the learning rate, e.g. ``("head.*", 10.0)``."""

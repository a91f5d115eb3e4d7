"""Settings of a run, flat, as they stand on the command line and in config.yaml. Imports neither torch nor ray."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from cluster.config import TransportName
from paramserver.config import OnNan, OptimizerName, ScheduleName, WirePrecision
from paramserver.errors import ConfigError
from workers.config import Precision

__all__ = ["Backend", "Device", "RunConfig", "parse_image_size", "parse_pairs", "parse_steps"]

Backend = Literal["single", "ps", "ddp"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run. What is None is filled in from the task's recipe or from the machine, and then written down."""

    task: str = ""
    """ssd, fcn, rcnn, classify, or path/to/file.py:ClassName."""
    backend: Backend = "ps"
    """single (one process), ps (parameter server on Ray), ddp (torchrun)."""
    workers: int | None = None
    """Devices that compute; default: the visible GPUs, else 1."""
    servers: int = 1
    """Parameter servers (ps)."""
    microbatches: int | None = None
    """M, parts of a minibatch; equal M gives equal bits. Default: workers rounded up to a power of two."""
    batch_size: int | None = None
    """Global minibatch size; default: the recipe's."""
    steps: int | None = None
    """Steps to train; goes before epochs."""
    epochs: int | None = None
    """Passes over the training set; default: the recipe's."""
    seed: int = 0
    """Seed of weights, order, augmentation and synthetic data."""
    data: str = "synthetic"
    """synthetic, banana:PATH (ssd), voc:PATH (ssd, fcn), coco:PATH (ssd), masks:PATH (fcn), folder:PATH or
    cifar10:PATH (classify)."""
    classes: str | None = None
    """Class names, comma-separated, in the order of their labels; default: the data's."""
    split_train: str = "train"
    """ImageSets file with the training images (voc), or split of the instances (coco)."""
    split_val: str = "val"
    """ImageSets file with the validation images (voc), or split of the instances (coco)."""
    image_size: int | str | None = None
    """Training image size in pixels, HxW or one number; default: the task's."""
    model: str | None = None
    """Network; default: the task's."""
    augment: str | None = None
    """How training images are varied: none, light or ssd (ssd), none, crop or scale (fcn), none or crop (classify);
    default: the network's."""
    image_cache: int = 512
    """MiB of decoded images that each process keeps which reads any; 0: none."""
    recipe: str = "default"
    """Training settings that belong together; the task says which it has (d2l, default)."""
    optimizer: OptimizerName | None = None
    """sgd, adam or adamw; default: the recipe's."""
    lr: float | None = None
    """Peak learning rate, never rescaled; default: the recipe's."""
    momentum: float | None = None
    """SGD momentum; default: the recipe's."""
    nesterov: bool | None = None
    """Nesterov momentum; default: the recipe's."""
    weight_decay: float | None = None
    """Weight decay; default: the recipe's."""
    schedule: ScheduleName | None = None
    """constant, step, cosine or polynomial; default: the recipe's."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; default: the recipe's."""
    lr_factors: str | None = None
    """Factors by key pattern, e.g. 'head.*=10,bias=2'; default: the recipe's."""
    freeze: str | None = None
    """Patterns of keys that are not trained, comma-separated."""
    freeze_batch_norm: bool = False
    """Leave batch norm as it is in --weights: neither its statistics nor its scale and shift change."""
    weights: str | None = None
    """File of weights to start from (safetensors, or torch.save of a state dict), or a name of torchvision's, such as
    ResNet18_Weights.IMAGENET1K_V1; what does not fit is reported."""
    download: bool = False
    """Fetch what is not here: --weights by name, cifar10:PATH, voc:PATH (2012). Nothing is downloaded otherwise."""
    clip_grad_norm: float | None = None
    """Largest l2 norm of the whole gradient."""
    on_nan: OnNan = "stop"
    """A non-finite gradient: stop the run by the key's name, or skip the step."""
    precision: Precision = "fp32"
    """fp32, or autocast in bf16 or fp16; fp16 scales the loss of each microbatch."""
    compile: bool = False
    """Compile the network with torch.compile (kernels depend on shapes alone, so bits stay equal)."""
    loader_processes: int | None = None
    """Processes of each worker that read and vary images in the background; default: 2 for a GPU, else 0."""
    channels_last: bool = False
    """Images and weights in channels-last order."""
    threads: int = 1
    """Threads of a CPU device, in every backend."""
    device: Device = "auto"
    """auto takes GPUs if there are any, else one CPU core stands in for a GPU."""
    transport: TransportName = "auto"
    """How tensors travel (ps): auto is shared memory inside a node and Ray between nodes, ray is Ray everywhere."""
    wire_precision: WirePrecision = "fp32"
    """What contributions are rounded to where they go through Ray (ps): fp32 is exact; bf16 and fp16 halve the bytes,
    with error feedback, but the bits then depend on how the work is spread."""
    overlap: bool | None = None
    """Push slices while backward goes on, inside a node (ps); default: if it has a core for the servers to spare."""
    early_forward: bool | None = None
    """Begin the next forward pass with the parameters that are there, inside a node (ps); a GPU has it in its queue
    when they come. Never with a vote. Default: on GPUs."""
    arena_dir: str = "/dev/shm"
    """Folder in whose file system shared memory is made (ps)."""
    server_threads: int | None = None
    """Threads of each server (ps); default: the cores that its waiting workers leave idle."""
    share_device: bool = False
    """Allow several workers on one GPU."""
    drop_last: bool = False
    """Leave out the short minibatch at the end of an epoch."""
    eval_every: int = 0
    """Steps between evaluations; 0: at the end alone."""
    evaluate: bool = True
    """Evaluate on the validation split at all."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: at the end alone."""
    resume: str | None = None
    """Run folder or checkpoint folder to go on from, or auto: the run's own folder (--name), if it has a checkpoint."""
    keep_checkpoints: int = 0
    """How many checkpoints to keep; 0: all. The best one by --best-metric is kept beside them."""
    best_metric: str | None = None
    """Metric of the validation split by which a checkpoint is the best, -NAME where less is better; default: its
    first, more is better."""
    out: str = "runs"
    """Folder of run folders."""
    name: str | None = None
    """Name of the run folder; default: <task>-<backend>-<time>."""
    overwrite: bool = False
    """Replace an existing run folder."""
    address: str | None = None
    """host:port of a running Ray cluster to join (ps); default: a private local one."""
    step_timeout: float | None = None
    """Seconds without a step after which a server or worker is taken for dead (ps) or the run ends (ddp); default: 30,
    or ten median steps if that is more (ps), 300 (ddp)."""
    spares: int = 1
    """Processes that stand by to take the place of one that dies: so many on each node with servers for those, and, on
    CPUs, so many for workers (ps)."""
    verify_every: int = 0
    """Steps between comparisons of what each worker holds with what the servers committed (ps); 0: never."""
    fingerprint_every: int = 0
    """Steps between fingerprints in metrics.jsonl, by which pushpull diff finds where two runs part; 0: none."""
    profile_steps: str | None = None
    """Steps of which each worker writes a trace into the run's folder profile/, on its own machine, e.g. 5-7
    (torch.profiler; for Perfetto or chrome://tracing)."""
    faults: str | None = None
    """YAML file of faults to happen to the run, e.g. '- kill: {role: worker, index: 1, step: 3, stage: push}' (ps)."""
    replicas: int = 0
    """1 keeps each server's committed versions on another node, too, at the price of sending them there (ps)."""
    max_restarts: int = 0
    """Times that all ranks are started again from the newest checkpoint after one died (ddp)."""
    min_workers: int = 1
    """With fewer workers left the run waits for replacements, and ends if none come (ps)."""
    slice_bytes: int = 1 << 20
    """Largest slice of the parameters in bytes."""
    dry_run: bool = False
    """Check everything, print what would run, write nothing."""

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, plain values."""
        return asdict(self)

    def __post_init__(self) -> None:
        for field in ("backend", "device", "on_nan", "precision", "transport", "wire_precision"):
            allowed = get_args({f.name: f.type for f in fields(self)}[field])
            if allowed and getattr(self, field) not in allowed:
                raise ConfigError(f"{field} is {getattr(self, field)!r}: use one of {', '.join(allowed)}")
        for field in (
            "workers",
            "servers",
            "microbatches",
            "batch_size",
            "steps",
            "epochs",
            "threads",
            "server_threads",
        ):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ConfigError(f"--{field.replace('_', '-')} is {value}: it must be 1 or more")
        for field in (
            "seed",
            "eval_every",
            "checkpoint_every",
            "spares",
            "max_restarts",
            "replicas",
            "min_workers",
            "keep_checkpoints",
            "verify_every",
            "fingerprint_every",
            "image_cache",
            "loader_processes",
        ):
            if (getattr(self, field) or 0) < 0:
                raise ConfigError(f"--{field.replace('_', '-')} is {getattr(self, field)}: it must be 0 or more")
        if self.wire_precision != "fp32" and self.backend != "ps":
            raise ConfigError(
                f"--wire-precision {self.wire_precision} with --backend {self.backend}: only ps sends contributions "
                "through Ray; say --backend ps or --wire-precision fp32"
            )
        if self.resume == "auto" and self.name is None:
            raise ConfigError("--resume auto looks into the run's own folder: say which by --name")
        parse_steps(self.profile_steps)
        if self.step_timeout is not None and not self.step_timeout > 0:
            raise ConfigError(f"--step-timeout is {self.step_timeout}: it must be above 0 seconds")


def parse_image_size(text: int | str | None) -> tuple[int, int] | None:
    """``256`` or ``320x480`` as height and width in pixels.

    Raises:
        ConfigError: for anything else.
    """
    if text is None:
        return None
    parts = str(text).lower().replace(",", "x").split("x")
    if len(parts) not in (1, 2) or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"--image-size {text!r} is neither a number nor HxW, e.g. 256 or 320x480")
    return int(parts[0]), int(parts[-1])


def parse_steps(text: int | str | None) -> tuple[int, int] | None:
    """``7`` or ``5-7`` as first and last step.

    Raises:
        ConfigError: for anything else.
    """
    if text is None:
        return None
    parts = [part.strip() for part in str(text).split("-")]
    if len(parts) > 2 or not all(part.isdigit() for part in parts) or not 1 <= int(parts[0]) <= int(parts[-1]):
        raise ConfigError(f"--profile-steps {text!r} is neither a step nor the first and the last of some, e.g. 5-7")
    return int(parts[0]), int(parts[-1])


def parse_pairs(text: str) -> tuple[tuple[str, float], ...]:
    """``pattern=factor,pattern=factor`` as pairs.

    Raises:
        ConfigError: for anything else.
    """
    pairs = []
    for part in text.split(","):
        pattern, _, factor = part.rpartition("=")
        try:
            pairs.append((pattern.strip(), float(factor)))
        except ValueError:
            raise ConfigError(f"--lr-factors {part!r} is not PATTERN=FACTOR, e.g. 'class_heads.*=10'") from None
    return tuple(pairs)

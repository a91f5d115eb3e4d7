"""Options, configuration files and what --help costs."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

from launch.arguments import build_parser, config_first
from launch.cli import main
from launch.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]
TRAIN_OPTIONS = (
    "--backend --workers --servers --microbatches --batch-size --steps --epochs --seed --data --out --name --threads "
    "--resume --overwrite --model --lr --momentum --weight-decay --optimizer --precision --channels-last --image-size "
    "--clip-grad-norm --eval-every --checkpoint-every --address --recipe --dry-run"
)


def parse(*arguments: str) -> RunConfig:
    """The settings of ``pushpull train``."""
    options = vars(build_parser().parse_args(config_first(["train", *arguments])).train)
    return RunConfig(**{name: value for name, value in options.items() if name != "config"})


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["bench", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys, launch.cli\n"
        "try:\n"
        "    launch.cli.main(sys.argv[1:])\n"
        "finally:\n"
        "    heavy = {'torch', 'torchvision', 'ray', 'numpy', 'matplotlib'} & sys.modules.keys()\n"
        "    assert not heavy, heavy\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "pushpull" in ended.stdout


def test_train_has_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0
    words = set(capsys.readouterr().out.replace(",", " ").replace("]", " ").split())
    assert set(TRAIN_OPTIONS.split()) <= words


def test_a_warning_of_ours_is_a_line_that_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True, action="always") as shown:
        assert main(["tasks"]) == 0
        for _ in range(2):
            warnings.warn_explicit("left out 1 box", UserWarning, str(ROOT / "models" / "task.py"), 1)
        warnings.warn_explicit("theirs", UserWarning, "elsewhere.py", 1)
    assert [str(warning.message) for warning in shown] == ["theirs"]
    assert capsys.readouterr().err == "pushpull: left out 1 box\n"


def test_option_has_the_field_s_docstring_as_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "ssd, fcn, rcnn, classify, or path/to/file.py:ClassName" in text
    assert "Parameter servers (ps)." in text


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        ("--channels-last", "channels_last", True),
        ("--channels_last", "channels_last", True),
        ("--channels-last=false", "channels_last", False),
        ("--evaluate false", "evaluate", False),
        ("--lr 1e-3", "lr", 1e-3),
        ("--image-size 256", "image_size", 256),
        ("--image-size 320x480", "image_size", "320x480"),
        ("--name 2026-01-01", "name", "2026-01-01"),
        ("--name 12", "name", "12"),
        ("--freeze *.bias", "freeze", "*.bias"),
        ("--classes %a,@b", "classes", "%a,@b"),
        ("--clip-grad-norm 1", "clip_grad_norm", 1.0),
    ],
)
def test_value(arguments: str, field: str, value: object) -> None:
    found = getattr(parse("ssd", *arguments.split()), field)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("key", ["batch-size", "batch_size"])
def test_keys_of_a_file_may_have_dashes_or_underscores(key: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"task: fcn\n{key}: 12\nlr: 1e-3\n")
    config = parse("--config", str(file))
    assert (config.task, config.batch_size, config.lr) == ("fcn", 12, 1e-3)


@pytest.mark.parametrize(
    "arguments", ["ssd --seed 3 --config FILE", "--config FILE ssd --seed 3", "ssd --config=FILE --seed 3"]
)
def test_command_line_goes_before_the_file(arguments: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("task: fcn\nseed: 5\nsteps: 7\n")
    config = parse(*arguments.replace("FILE", str(file)).split())
    assert (config.task, config.seed, config.steps) == ("ssd", 3, 7)


def test_printed_configuration_can_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "ssd", "--lr", "0.5", "--channels-last", "--print_config"])
    assert ended.value.code == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert yaml.safe_load(file.read_text())["lr"] == 0.5
    assert parse("--config", str(file)) == parse("ssd", "--lr", "0.5", "--channels-last")


def test_bench_checks_equality_and_so_has_no_wire_precision(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "ssd", "--wire-precision", "bf16"]) == 2
    complaint = capsys.readouterr().err.strip()
    assert complaint == "pushpull: unknown argument --wire-precision: another command has it, this one does not"

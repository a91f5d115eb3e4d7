"""Settings of a benchmark and the rows that follow from them."""

import pytest

from launch.bench_config import BenchConfig, parse_counts
from launch.bench_plan import plan_task, row_command
from launch.config import RunConfig
from paramserver.errors import ConfigError


@pytest.mark.parametrize(
    "wrong",
    [
        {"backends": "ps,horovod"},
        {"scaling": "sideways"},
        {"workers": "1,0"},
        {"repeats": 0},
        {"warmup": -1},
        {"batch_size": 0},
    ],
)
def test_wrong_settings_name_their_option(wrong: dict) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}"):
        BenchConfig(**wrong)


def test_lists_are_ordered_and_have_each_value_once() -> None:
    config = BenchConfig(backends="ddp, single,ps", scaling="strong,weak")
    assert parse_counts("4, 1,2,2") == [1, 2, 4]
    assert config.backend_names == ["single", "ps", "ddp"]
    assert config.scalings == ["weak", "strong"]


def test_command_has_what_is_not_a_default() -> None:
    config = BenchConfig(workers="1", channels_last=False, overwrite=True, label="demo size")
    expected = "pushpull bench ssd --workers 1 --channels-last false --overwrite --label 'demo size'"
    assert config.command(["ssd"]) == expected


def test_rows_of_both_kinds_of_scaling() -> None:
    config = BenchConfig(backends="single,ps", workers="1,2", batch_size=6, image_size=64, steps=3, warmup=1)
    plan = plan_task("ssd", config)
    rows = [(row.scaling, row.backend, row.workers, row.batch_size) for row in plan.rows]
    one_kind = [("baseline", 1), ("single", 1), ("ps", 1), ("ps", 2)]
    weak = [("weak", backend, workers, 6 * workers) for backend, workers in one_kind]
    strong = [("strong", backend, workers, 6) for backend, workers in one_kind]
    assert rows == weak + strong
    for row, run in plan.rows.items():
        assert (run.microbatches, run.steps, run.drop_last, run.evaluate) == (row.workers, 4, True, False)


def test_equality_runs_everything_on_the_same_microbatches() -> None:
    plan = plan_task("ssd", BenchConfig(workers="1,3", image_size=64, batch_size=3))
    assert list(plan.equality) == [("single", 1), ("ps", 1), ("ps", 3), ("ddp", 1), ("ddp", 3)]
    # M = 4; nine images, so that one microbatch has more than the others.
    assert {(run.microbatches, run.batch_size, run.steps) for run in plan.equality.values()} == {(4, 9, 3)}
    assert plan_task("ssd", BenchConfig(equality_steps=0, image_size=64)).equality == {}


def test_a_minibatch_larger_than_the_data_set_is_refused() -> None:
    with pytest.raises(ConfigError, match="weak scaling to 2: a minibatch of 600 images is larger"):
        plan_task("ssd", BenchConfig(batch_size=300, image_size=64))


def test_strong_scaling_needs_an_image_for_each_worker() -> None:
    with pytest.raises(ConfigError, match="strong scaling to 3: a minibatch of 2 images is smaller"):
        plan_task("ssd", BenchConfig(workers="3", batch_size=2, image_size=64))


def test_a_rows_command_names_its_settings() -> None:
    plan = plan_task("ssd", BenchConfig(backends="ps", workers="2", image_size=64, batch_size=4, steps=2, warmup=1))
    baseline, row = list(plan.rows)[:2]
    assert row_command(baseline, plan.rows[baseline]) == ""
    words = row_command(row, plan.rows[row])
    assert words.startswith("pushpull train ssd --backend ps --workers 2 --servers 1 --spares 0 --microbatches 2 ")
    assert isinstance(plan.rows[row], RunConfig)


def test_every_row_has_the_network_and_the_loader_that_were_asked_for() -> None:
    config = BenchConfig(workers="1", model="ssd300_resnet50", augment="none", loader_processes=2, batch_size=2)
    plan = plan_task("ssd", config)
    runs = [*plan.rows.values(), *plan.equality.values()]
    assert {(run.model, run.augment, run.loader_processes) for run in runs} == {("ssd300_resnet50", "none", 2)}
    row = next(row for row in plan.rows if not row.is_baseline)
    assert "--model ssd300_resnet50 --augment none --loader-processes 2 " in row_command(row, plan.rows[row])
    assert config.command(["ssd"]) == (
        "pushpull bench ssd --workers 1 --batch-size 2 --model ssd300_resnet50 --augment none --loader-processes 2"
    )

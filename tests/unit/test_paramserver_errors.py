"""One tree of errors that can be raised in one process and shown by another."""

import pickle

import pytest

from paramserver import errors
from paramserver.errors import ConfigError, PushPullError, PushRefused

CLASSES = [getattr(errors, name) for name in errors.__all__]


def tree(cls: type) -> set[type]:
    return {cls}.union(*(tree(sub) for sub in cls.__subclasses__()))


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_survives_pickling_with_message_and_details(cls: type[PushPullError]) -> None:
    error = cls("worker 3 is gone: look at its log", worker=3, key="head.weight", steps=[1, 2])
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert (again.message, again.details, str(again)) == (error.message, error.details, str(error))


def test_every_class_is_exported_and_in_one_tree() -> None:
    ours = {cls for cls in tree(PushPullError) if cls.__module__ == errors.__name__}
    assert ours == set(CLASSES)


def test_the_docstring_draws_every_class() -> None:
    for cls in CLASSES:
        assert cls.__name__ in (errors.__doc__ or "")


def test_refusals_are_one_branch_and_settings_are_value_errors() -> None:
    assert {cls.__name__ for cls in tree(PushRefused)} == {
        "PushRefused",
        "PartitionMismatch",
        "StaleContribution",
        "OverlappingContribution",
    }
    assert issubclass(ConfigError, ValueError)

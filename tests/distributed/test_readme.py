"""What README shows works as it stands there."""

import re
from pathlib import Path

from tests.support.runs import train

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_task_in_readme_trains_with_equal_bits(tmp_path: Path) -> None:
    code = re.search(r"<!-- task -->\n```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert code
    (tmp_path / "my_task.py").write_text(code[1], encoding="utf-8")
    settings = {"task": f"{tmp_path}/my_task.py:Doubling", "steps": 4, "batch_size": 8, "microbatches": 2}
    one = train(tmp_path, "one", backend="single", **settings)
    two = train(tmp_path, "two", backend="ps", workers=2, **settings)
    assert one.summary["fingerprint"] == two.summary["fingerprint"]
    assert one.summary["metrics"] == two.summary["metrics"]


def test_the_python_example_in_readme_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(from launch.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    small = 'backend="single", image_size=64, batch_size=4, evaluate=False, steps=2'
    code = code.replace('backend="ps", workers=2, steps=20', small).replace('"runs"', repr(str(tmp_path)))
    exec(code, names := {})
    assert names["result"].summary["steps"] == 2

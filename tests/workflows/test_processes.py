"""Two processes of one command speak with one voice, and the second does not end in a traceback."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock

from tests.workflows.conftest import Killer, fill_with_images


def test_two_processes(killer: Killer, tiny_base: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "killed.log"
    images = fill_with_images(tmp_path / "pictures")
    arguments = ["train", f"model.path={tiny_base}", f"data.path={images}", f"output.path={run}", "adapter.rank=2"]
    arguments += ["train.max_steps=2", "train.precision=fp32", "train.threads=1", "evaluate.picture_draws=0", "--json"]
    assert killer.run(arguments, num_processes=2) == 0, log.read_text()
    result = log.read_text()
    assert result.count('"steps": 2') == 1
    assert result.count("Read 4 images") == 1
    assert result.count("step 1 of 2") == 1

    with FileLock(run / ".lock"):
        assert killer.run([*arguments, "--overwrite"], num_processes=2) in (1, 2)
    left = log.read_text().removeprefix(result)
    assert "Traceback" not in left
    assert left.count("another process is training into it") == 1
    assert left.count("process 2 of 2 stopped, since another one ended") == 1

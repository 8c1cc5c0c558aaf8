"""How the program starts, answers and ends: measured in processes of its own."""

from __future__ import annotations

import ast
import json
import os
import re
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lora_diffusion.cli import main as cli
from lora_diffusion.cli import start
from lora_diffusion.core.files import shipped_path

LIMIT_S = 0.5
PROGRAM = [sys.executable, "-m", "lora_diffusion"]
HEAVY = ("torch", "diffusers", "transformers", "peft", "numpy", "PIL", "safetensors", "accelerate")

_RUN = ("model.path=x", "data.path=y", "output.path=z")
_RUN_AND_TELL = f"""
import sys
from lora_diffusion.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as exit_:
    code = exit_.code or 0
heavy = [name for name in {HEAVY!r} if name in sys.modules]
print("\\n" + repr((code, heavy)))
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["train", "--help"], 0),
        (["quickstart", "--help"], 0),
        (["train", "model.pth=x"], 2),
        (["train", "--config", "no-such-file.yaml"], 2),
        (["train", "train.max_steps=many", "--dry-run"], 2),
        (["generate", "--model", "x", "--prompt", "a", "--output", "x", "--steps", "0"], 2),
        (["generate", "--model", "x", "--prompt", "a", "--output", "x", "--adapter", "no-such-file"], 2),
        (["config", "list"], 0),
        (["config", "show"], 0),
        (["config", "show", "train.batch_size=4"], 0),
        (["config", "check", "model.path=x", "data.path=y", "output.path=z"], 0),
        (["config", "check", "train.seed=-1"], 2),
        (["config", "check", *_RUN, "model.quantization=nf4", "adapter.variant=lora"], 0),
        (["config", "check", *_RUN, "model.quantization=nf4", "adapter.variant=loha"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_answers_without_the_heavy_libraries(arguments: list[str], code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _RUN_AND_TELL, *arguments], check=False, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == repr((code, [])), done.stderr


def test_work_on_files_does_not_wait_for_torch(tmp_path: Path) -> None:
    """torch alone takes longer to import than these commands to run."""
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    tensors = {f"{stem}.lora_down.weight": torch.ones(2, 2048) / 8, f"{stem}.lora_up.weight": torch.ones(640, 2) / 8}
    for name, dtype in (("half", torch.float16), ("brain", torch.bfloat16), ("full", torch.float32)):
        path = tmp_path / f"{name}.safetensors"
        settings = {key: tensor.to(dtype) for key, tensor in tensors.items()}
        save_file({**settings, f"{stem}.alpha": torch.tensor(2.0)}, path, {"ss_seed": "1"})
        commands = [["inspect", path], ["metadata", "edit", path, "--set", "modelspec.title=t"]]
        commands += [["convert", path, tmp_path / f"{name}-{to}", "--to", to] for to in ("kohya", "diffusers", "peft")]
        for arguments in commands:
            done = subprocess.run(
                [sys.executable, "-c", _RUN_AND_TELL, *map(str, arguments)], check=False, capture_output=True, text=True
            )
            code, heavy = ast.literal_eval(done.stdout.splitlines()[-1])
            assert code == 0, done.stderr
            assert {*heavy} <= {"numpy"}, arguments


def test_a_folder_of_images_is_checked_without_torch() -> None:
    images = shipped_path("datasets") / "blob-style" / "references"
    done = subprocess.run(
        [sys.executable, "-c", _RUN_AND_TELL, "data", "check", images], check=False, capture_output=True, text=True
    )
    code, heavy = ast.literal_eval(done.stdout.splitlines()[-1])
    assert code == 0, done.stderr
    assert {*heavy} <= {"numpy", "PIL", "safetensors"}
    assert min(_processor_s([*PROGRAM, "data", "check", str(images)]) for _ in range(2)) < 2 * LIMIT_S


def test_a_dry_run_imports_torch_and_nothing_of_its_size(tmp_path: Path) -> None:
    data = f"data.path={shipped_path('datasets') / 'blob-style' / 'references'}"
    code = _RUN_AND_TELL.replace(repr(HEAVY), repr((*HEAVY, "torch._dynamo", "scipy", "bitsandbytes")))
    for command in (["train", f"output.path={tmp_path / 'run'}", data, "--dry-run"], ["estimate"]):
        arguments = [command[0], "--config", "sd1/style", *command[1:]]
        done = subprocess.run([sys.executable, "-c", code, *arguments], check=False, capture_output=True, text=True)
        ended, heavy = ast.literal_eval(done.stdout.splitlines()[-1])
        assert ended == 0, done.stderr
        assert {*heavy} <= {"torch", "numpy", "PIL", "safetensors", "accelerate"}


@pytest.mark.parametrize("arguments", [["--help"], ["train", "train.max_step=3"]], ids=" ".join)
def test_answers_at_once(arguments: list[str]) -> None:
    """Counts the processor's time, since other programs may run beside the tests; nothing here waits."""
    assert min(_processor_s([*PROGRAM, *arguments]) for _ in range(3)) < LIMIT_S


def _processor_s(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=False, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_reader_that_stops_reading() -> None:
    for arguments in (["config", "show"], ["--help"], ["config", "show", "--json"]):
        process = subprocess.Popen([*PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process.stdout.close()  # type: ignore[union-attr]
        assert process.wait(60) == 0
        assert process.stderr.read() == ""  # type: ignore[union-attr]


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
@pytest.mark.parametrize(("closed", "code"), [(">&-", 0), ("2>&-", 0), ("<&- >&- 2>&-", 0), ("2>/dev/full >&2", 0)])
def test_streams_that_are_closed_or_full(closed: str, code: int) -> None:
    command = f'"$0" -m lora_diffusion config check model.path=x data.path=y output.path=z {closed}'
    done = subprocess.run(["sh", "-c", command, sys.executable], check=False, capture_output=True, text=True)
    is_full = "full" in closed
    assert done.returncode == (1 if is_full else code)
    assert done.stderr == ""


def test_a_full_disk_behind_stdout_is_told_once() -> None:
    command = '"$0" -m lora_diffusion config list > /dev/full'
    done = subprocess.run(["sh", "-c", command, sys.executable], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr


def test_reader_of_the_log_that_stops_reading(capfd: pytest.CaptureFixture[str]) -> None:
    """The work goes on without a reader."""
    reading, writing = os.pipe()
    code = "from lora_diffusion.core import logs; logs.set_up(); logs.logger.warning('a' * 1000); print('done')"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=writing, text=True)
    os.close(writing)
    os.close(reading)
    assert process.communicate(timeout=60)[0] == "done\n"
    assert process.returncode == 0


def test_ctrl_c_while_the_program_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_diffusion.cli.main.main", stop)
    assert start.main(["config", "list"]) == 1
    assert capsys.readouterr().err == "\nlora-diffusion: stopped.\n"


_STARTED = """
import sys
before = {*sys.modules}
import lora_diffusion.cli.start
print(sorted(name for name in {*sys.modules} - before if not name.startswith("lora_diffusion")))
"""


def test_ctrl_c_finds_the_program_ready() -> None:
    done = subprocess.run([sys.executable, "-c", _STARTED], check=False, capture_output=True, text=True)
    assert ast.literal_eval(done.stdout) in ([], ["collections.abc"])


_ESCAPE = "\x1b]0;x\x07\x1b[2J\x9b1m"


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in (f"{_ESCAPE}a.png", "b\nWARNING.png", "c\u202egnp.png"):
        Image.new("RGB", (64, 64), "red").save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"a {_ESCAPE}cat, blob{_ESCAPE} style", encoding="utf-8")
    (folder / f"{_ESCAPE}d.heic").write_text("")
    assert cli.main(["data", "check", str(folder)]) == 0
    shown = capsys.readouterr()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown.out + shown.err)
    assert r"\x1b[2J" in shown.out and r"b\nWARNING.png" in shown.out
    assert cli.main(["data", "check", str(folder), "--json"]) == 0
    shown = capsys.readouterr()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown.out)
    assert _ESCAPE in json.loads(shown.out)["trigger"] + json.loads(shown.out)["prior_example"][0]
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": f"{_ESCAPE}.png", "text": "x"}))
    for arguments in (["data", "check", str(folder)], ["data", "check", _ESCAPE], ["inspect", f"no{_ESCAPE}"]):
        assert cli.main(arguments) == 2
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", capsys.readouterr().err)
    with pytest.raises(SystemExit):
        cli.main(["inspect", "a", f"--{_ESCAPE}"])
    assert "\x1b" not in capsys.readouterr().err


def test_json_for_a_terminal_of_another_encoding(tmp_path: Path) -> None:
    done = subprocess.run(
        [*PROGRAM, "config", "check", "model.path=x", "data.path=y", "output.path=\u00e4\u732b", "--json"],
        check=False,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)


def test_warnings_of_libraries_are_for_debugging(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(*_: object) -> None:
        warnings.warn("Corrupt EXIF data", UserWarning, stacklevel=1)
        warnings.warn("CUDA initialization:\nthe driver is old", UserWarning, stacklevel=1)

    monkeypatch.setattr("lora_diffusion.cli.config.print_result", work)
    assert cli.main(["config", "list"]) == 0
    shown = capsys.readouterr().err
    assert "EXIF" not in shown


def test_lack_of_memory_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("lora_diffusion.cli.config.print_result", fail)
    assert cli.main(["config", "list"]) == 1
    assert capsys.readouterr().err == (
        "lora-diffusion config: there is not enough memory (no more can be had); close other programs or take less.\n"
    )


def test_command_is_installed() -> None:
    program = Path(sys.executable).with_name("lora-diffusion")
    if not program.exists():
        pytest.skip("the package is not installed beside this Python")
    done = subprocess.run([program, "--version"], check=False, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.strip()


def test_errors_are_short_unless_debugged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--config", str(tmp_path / "none.yaml")]
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(Exception, match=r"none\.yaml"):
        cli.main([*arguments, "--debug"])


def test_disk_that_fails_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", "run/x.safetensors")

    monkeypatch.setattr("lora_diffusion.cli.config.print_result", fail)
    assert cli.main(["config", "list"]) == 1
    error = capsys.readouterr().err
    assert "No space left on device: 'run/x.safetensors'" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "target", "resumes"),
    [
        (["config", "list"], "cli.config.print_result", ""),
        (["train", "sd1/style"], "workflows.train.train", "with --resume to"),
        (["train", "sd1/style", "--overwrite"], "workflows.train.train", "with --resume instead of --overwrite to"),
    ],
)
def test_interrupt_says_how_to_go_on(
    command: list[str],
    target: str,
    resumes: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"lora_diffusion.{target}", interrupt)
    assert cli.main([*command, *(["data.path=x"] if resumes else [])]) == 1
    error = capsys.readouterr().err
    assert "stopped" in error
    assert resumes in error
    assert ("--resume" in error) == bool(resumes)


def test_environment_is_not_needed(tmp_path: Path) -> None:
    """From another folder, without home or locale."""
    done = subprocess.run(
        [*PROGRAM, "config", "list", "--json"],
        check=False,
        capture_output=True,
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(cli.__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    assert "sd1/style" in json.loads(done.stdout)


def test_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "lora_diffusion", "--version"], check=False, capture_output=True)
    assert done.returncode == 0
    assert done.stdout


@pytest.mark.parametrize(("command", "can_continue"), [("train", True), ("quickstart", True), ("config", False)])
def test_stopping_by_hand_names_resume_where_it_works(
    command: str, can_continue: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(args: object) -> None:
        raise KeyboardInterrupt

    for module, function in ((cli.train, "run"), (cli.quickstart, "run"), (cli.config, "show")):
        monkeypatch.setattr(module, function, stop)
    assert cli.main([command, *(["show"] if command == "config" else [])]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 2
    assert ("--resume" in line) is can_continue

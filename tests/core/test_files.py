from __future__ import annotations

import errno
import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lora_diffusion.core.adapter_state import ModuleKey
from lora_diffusion.core.errors import AdapterFileError, ConfigError, DataError
from lora_diffusion.core.files import (
    atomic_path,
    check_writable,
    default_cache_path,
    not_a_file,
    read_json,
    remove_leftovers,
    save_tensors,
    sha256,
    user_path,
    write_json,
    write_text,
)
from lora_diffusion.core.keymap import KeyMap
from lora_diffusion.core.rng import derive, derive_seed
from lora_diffusion.core.text import suggestion


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for content in ("a", "b"):
        with atomic_path(path) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert [file.name for file in path.iterdir()] == ["b"]
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".part-1234-x").mkdir()
    (tmp_path / ".part-5678-y").write_text("half")
    write_json(tmp_path / "kept.json", {"a": 1})
    remove_leftovers(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["kept.json"]


def test_leftovers_that_another_process_may_be_writing_stay(tmp_path: Path) -> None:
    for age_s, name in ((10, "new"), (10_000, "old")):
        path = tmp_path / "ab" / f".part-1234-{name}"
        write_text(path, "half")
        os.utime(path, (path.stat().st_mtime - age_s,) * 2)
    remove_leftovers(tmp_path, "*/", older_than_s=3600)
    assert [file.name for file in (tmp_path / "ab").iterdir()] == [".part-1234-new"]
    remove_leftovers(tmp_path / "nowhere")


def test_leftovers_that_two_processes_remove_at_once(tmp_path: Path) -> None:
    for _ in range(5):
        for index in range(50):
            (tmp_path / f".part-{index}-step").mkdir()
            (tmp_path / f".part-{index}-step" / "a").write_bytes(b"x")
        barrier = threading.Barrier(2)

        def remove(barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            remove_leftovers(tmp_path)

        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(remove) for _ in range(2)]:
                done.result()
        assert not list(tmp_path.iterdir())


def test_of_a_link_only_the_link_is_removed(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a").touch()
    (tmp_path / ".part-1-x").symlink_to(tmp_path / "own")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["own", "a"]


def test_two_processes_that_write_one_folder(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)

    def write(number: int) -> None:
        for _ in range(10):
            with atomic_path(tmp_path / "x") as temporary:
                temporary.mkdir()
                (temporary / "a").write_text(str(number))
                (temporary / "b").write_text(str(number))
                barrier.wait()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert (tmp_path / "x" / "a").read_text() == (tmp_path / "x" / "b").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    assert [not_a_file(tmp_path / name) for name in ("pipe", "file", "loop", "gone", "a\0b")] == ["a pipe", *[None] * 4]
    assert [not_a_file(tmp_path), not_a_file(Path("/dev/zero"))] == [None, "a device"]


def test_no_home_folder_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LORA_DIFFUSION_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", str)  # as where the user has no entry in passwd
    with pytest.raises(ConfigError, match=r"HOME is not set.*set LORA_DIFFUSION_CACHE to a folder"):
        default_cache_path()


def test_tensors_that_the_disk_does_not_take_are_an_os_error(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught, atomic_path(tmp_path / "a") as temporary:
            save_tensors({"x": torch.zeros(2**16)}, temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*/plan\.json"):
            write_text(tmp_path / "plan.json", "x" * 2**17)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_writable_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b", "output.path")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that holds no files of users")
def test_folder_whose_rights_promise_too_much() -> None:
    with pytest.raises(ConfigError, match=r"cache\.path=/proc/x: /proc cannot be written"):
        check_writable(Path("/proc/x"), "cache.path")


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1.
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_key_map_is_a_bijection() -> None:
    key = ModuleKey("unet", "a.b")
    names = KeyMap([(key, "unet_a_b")])
    assert names.key(names.name(key)) == key
    with pytest.raises(ValueError, match="bijection"):
        KeyMap([(key, "x"), (ModuleKey("unet", "c"), "x")])
    with pytest.raises(AdapterFileError, match='did you mean "unet_a_b"'):
        names.key("unet_a_c")


def test_unknown_names_are_listed_up_to_ten() -> None:
    with pytest.raises(AdapterFileError) as caught:
        KeyMap([]).require([f"module{index}" for index in range(30)], "x.safetensors")
    assert "30 of its modules" in str(caught.value)
    assert len(caught.value.errors) == 10


def test_seeds_depend_on_every_number() -> None:
    seeds = {derive_seed(*path) for path in ((0,), (1,), (0, "a"), (0, "b"), (0, "a", 1), (0, "a", 11), (0, "a", 1, 1))}
    assert len(seeds) == 7
    assert derive(3, "x", 1).initial_seed() == derive(3, "x", 1).initial_seed()


def test_errors_stand_one_below_the_other() -> None:
    assert str(DataError("Two errors.", ["a", "b"])) == "Two errors.\n  - a\n  - b"
    assert suggestion("attm", ["attn", "ff"]) == ' (did you mean "attn"?)'
    assert suggestion("zzz", ["attn"]) == ""


def test_an_unknown_home_folder_is_told_with_the_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/a", "data.path") == tmp_path / "a"
    with pytest.raises(ConfigError, match=r"data\.path=~nobody-of-this-name/a: there is no home folder"):
        user_path("~nobody-of-this-name/a", "data.path")


class TestJsonOfStrangers:
    @pytest.mark.parametrize(
        ("content", "error"),
        [
            (b"[" * 100_000, "brackets in brackets too deep"),
            (b'{"a": ' * 2000, "brackets in brackets too deep"),
            (b"9" * 5000, "too many digits"),
            (rb'{"a": "cut \ud83d"}', "half a character"),
            (b'"\xed\xa0\xbd"', "invalid continuation byte"),
            (b'"\xff"', "invalid start byte"),
            (b"{]", "Expecting property name"),
        ],
    )
    def test_what_cannot_be_read(self, content: bytes, error: str, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(ValueError, match=error):
            read_json(tmp_path / "a.json")

    def test_what_is_no_file_is_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "zero").symlink_to("/dev/zero")
        for name, kind in (("pipe", "a pipe"), ("zero", "a device")):
            with pytest.raises(ValueError, match=f"it is {kind}"):
                read_json(tmp_path / name)

    def test_what_is_too_large_is_not_read(self, tmp_path: Path) -> None:
        with (tmp_path / "a.json").open("wb") as stream:
            stream.truncate(65 * 2**20)
        with pytest.raises(ValueError, match="68,157,440 bytes"):
            read_json(tmp_path / "a.json")

    def test_a_byte_order_mark(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": "\xf0\x9f\x98\x80"}')
        assert read_json(tmp_path / "a.json") == {"a": "\U0001f600"}

"""Files that are whole or absent, locks, and sources that name the environment's variables."""

import errno
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from torchdsc.lab import files
from torchdsc.lab.files import (
    cache_folder,
    expand,
    locked,
    made_once,
    naming_writes,
    new_folder,
    read_json,
    remove_drafts,
    whole_folder,
    write_json,
    write_text,
)

# Makes a folder once, as soon as it may go on; says how far it is.
MAKES = """
import sys, time
from pathlib import Path
from torchdsc.lab.files import made_once, whole_folder

path = Path(sys.argv[1])

def make():
    with whole_folder(path) as draft:
        (draft / "part").write_text("half")
        print("begun", flush=True)
        while not path.with_name("go").exists():
            time.sleep(0.01)
        (draft / "part").write_text("whole")

print("asks", flush=True)
print(made_once(path, (path / "part").read_text, make), flush=True)
"""


@pytest.fixture
def start(tmp_path):
    """Starts a process that makes tmp_path / "thing", and waits for its words: returns it. Kills it in the end."""
    processes = []

    def begin(*words):
        arguments = [sys.executable, "-c", MAKES, str(tmp_path / "thing")]
        processes.append(subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True))
        said(processes[-1], *words)
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def said(process, *words):
    assert [process.stdout.readline().strip() for _ in words] == list(words)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class TestMadeOnce:
    def test_one_makes_what_others_wait_for(self, tmp_path, start):
        first, second = start("asks", "begun"), start("asks")
        # Time in which the second would begin too.
        time.sleep(0.3)
        (tmp_path / "go").touch()
        said(first, "whole")
        said(second, "whole")
        assert names(tmp_path) == [".thing.lock", "go", "thing"]

    def test_after_a_kill(self, tmp_path, start):
        killed, waiting = start("asks", "begun"), start("asks")
        (draft,) = tmp_path.glob(".thing.*.tmp")
        with locked(tmp_path / ".thing.lock", wait=False) as is_mine:
            assert not is_mine
        killed.kill()
        said(waiting, "begun")
        assert not draft.exists()
        (tmp_path / "go").touch()
        said(waiting, "whole")
        assert names(tmp_path) == [".thing.lock", "go", "thing"]

    def test_what_is_there_takes_no_lock(self, tmp_path):
        assert made_once(tmp_path / "thing", lambda: 1, pytest.fail) == 1
        assert names(tmp_path) == []

    def test_damage(self, tmp_path, caplog):
        file = tmp_path / "thing"
        for text in ("absent", "{", "[]"):
            if text != "absent":
                file.write_text(text)
            assert made_once(file, lambda: read_json(file), lambda: write_json(file, {"a": 1})) == {"a": 1}
        begin = f"{file} is damaged and will be made anew: {file} is damaged: "
        assert [message.startswith(begin) for message in caplog.messages] == [True, True]

    def test_a_failure_frees_the_lock(self, tmp_path):
        file = tmp_path / "thing"
        with pytest.raises(ZeroDivisionError):
            made_once(file, file.read_text, lambda: 1 / 0)
        assert made_once(file, file.read_text, lambda: file.write_text("made")) == "made"


class TestLocked:
    def test_is_free_after_the_block(self, tmp_path):
        for _ in range(2):
            with locked(tmp_path / "new" / ".lock", wait=False) as is_mine:
                assert is_mine
                with locked(tmp_path / "new" / ".lock", wait=False) as is_mine_again:
                    assert not is_mine_again

    def test_a_long_wait_is_told(self, tmp_path, caplog, monkeypatch):
        monkeypatch.setattr(files, "_PATIENCE", 0.1)
        with ThreadPoolExecutor(1) as pool, locked(tmp_path / ".lock", wait=True):

            def take():
                with locked(tmp_path / ".lock", wait=True) as is_mine:
                    return is_mine

            taken = pool.submit(take)
            time.sleep(0.3)
            assert not taken.done()
            assert caplog.messages == [f"waiting for another process, which holds {tmp_path / '.lock'}"]
        assert taken.result()
        with locked(tmp_path / ".lock", wait=True):
            assert len(caplog.messages) == 1


class TestDrafts:
    def test_file_and_folder_appear_whole(self, tmp_path):
        file, folder = tmp_path / "new" / "file", tmp_path / "new" / "folder"
        for text in ("one", "two"):
            write_text(file, text)
            with whole_folder(folder) as draft:
                (draft / text).touch(0o600)
                assert not (folder / text).exists()
        assert file.read_text() == "two"
        assert names(folder) == ["two"]
        assert names(folder.parent) == ["file", "folder"]
        modes = [path.stat().st_mode & 0o777 for path in (file, folder, folder / "two")]
        assert modes == [0o644, 0o755, 0o644]

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_interruption_keeps_what_was_there(self, tmp_path, monkeypatch, error):
        def interrupt(*_):
            raise error

        def fill_folder():
            with whole_folder(tmp_path / "folder") as draft:
                (draft / "half").touch()
                interrupt()

        write_text(tmp_path / "file", "whole")
        write_text(tmp_path / "folder" / "kept", "whole")
        monkeypatch.setattr(files.os, "fsync", interrupt)
        with pytest.raises(error):
            write_text(tmp_path / "file", "half")
        with pytest.raises(error):
            fill_folder()
        assert (tmp_path / "file").read_text() == "whole"
        assert names(tmp_path / "folder") == ["kept"]
        assert names(tmp_path) == ["file", "folder"]

    def test_full_disk_is_named(self, tmp_path, monkeypatch):
        def full(*arguments):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with pytest.raises(OSError, match=r"No space left on device: '.*/folder'$"), whole_folder(tmp_path / "folder"):
            full()
        monkeypatch.setattr(files.os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*/table.md'$"):
            write_text(tmp_path / "table.md", "text")
        assert names(tmp_path) == []
        with pytest.raises(OSError, match=r"'/dev/null/folder/file'$"):
            write_text(files.Path("/dev/null/folder/file"), "text")

    @pytest.mark.parametrize(("name", "left"), [(None, []), ("file", ["folder"]), ("folder", ["file"])])
    def test_those_of_killed_processes_are_removed(self, tmp_path, name, left):
        others = [".table.md.swp", ".hidden", "table.md.abcdefgh.tmp", ".a.tmp", ".settings.json.disabled"]
        for place in (*others, ".file.abcd_123.tmp", ".folder.abcd_123.tmp/part"):
            (tmp_path / place).parent.mkdir(exist_ok=True)
            (tmp_path / place).touch()
        remove_drafts(tmp_path, name)
        assert names(tmp_path) == sorted([*others, *(f".{place}.abcd_123.tmp" for place in left)])


class TestNamingWrites:
    @pytest.mark.parametrize(
        "write",
        [
            lambda path: save_file({"a": torch.zeros(10_000)}, path),
            lambda path: torch.save(torch.zeros(10_000), path),
            lambda path: path.write_bytes(bytes(40_000)),
        ],
        ids=["safetensors", "torch", "python"],
    )
    def test_libraries_that_cannot_write(self, tmp_path, write):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        # A limit on a file's size fails in the same places as a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            with pytest.raises(OSError, match=r"weights could not be written: \S"), naming_writes(tmp_path / "weights"):
                write(tmp_path / "weights")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    @pytest.mark.parametrize(
        "text", ["[enforce fail at inline_container.cc:672] . unexpected pos 576", "basic_ios::clear: iostream error"]
    )
    def test_what_torch_says_of_a_full_disk(self, tmp_path, text):
        message = r"optimizer.pt could not be written: .*; is the disk full\?"
        with pytest.raises(OSError, match=message), naming_writes(tmp_path / "optimizer.pt"):
            raise RuntimeError(text)

    @pytest.mark.parametrize("error", [RuntimeError("else"), KeyboardInterrupt()])
    def test_other_errors_pass(self, tmp_path, error):
        with pytest.raises(type(error)), naming_writes(tmp_path):
            raise error


@pytest.mark.parametrize("held", ["nothing", "made inside", "made before"])
def test_new_folder_of_what_fails(tmp_path, held):
    """It is removed, unless something is in it or it was there before."""

    def fail():
        with new_folder(tmp_path / "a" / "b"):
            assert (tmp_path / "a" / "b").is_dir()
            if held == "made inside":
                (tmp_path / "a" / "file").touch()
            raise KeyboardInterrupt

    if held == "made before":
        (tmp_path / "a").mkdir()
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert names(tmp_path) == ([] if held == "nothing" else ["a"])
    assert not (tmp_path / "a" / "b").exists()
    with new_folder(tmp_path / "c" / "d"):
        pass
    assert (tmp_path / "c" / "d").is_dir()


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TORCHDSC_CACHE", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "torchdsc"
    monkeypatch.setenv("TORCHDSC_CACHE", "~/chosen")
    assert cache_folder() == tmp_path / "chosen"


def test_json(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"b": 1})
    assert read_json(file, keys=["b"]) == {"b": 1}
    with pytest.raises(
        ValueError, match=r"a\.json is damaged: it lacks c, d; put it back, or delete it and run the experiment again"
    ):
        read_json(file, keys=["b", "c", "d"])
    for text in ("{", "[1]"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"a\.json is damaged: .*; put it back"):
            read_json(file)


def test_expand(monkeypatch):
    monkeypatch.setenv("SOMEWHERE", "/data")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert expand("${SOMEWHERE}/a.tsv") == expand("$SOMEWHERE/a.tsv") == "/data/a.tsv"
    assert expand("plain/file $ 1.txt") == "plain/file $ 1.txt"
    with pytest.raises(ValueError, match=r"^\$\{NOWHERE\}/a.tsv: the environment variable NOWHERE is not set$"):
        expand("${NOWHERE}/a.tsv")

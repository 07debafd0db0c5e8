"""Files that are whole or absent, and sources that name the environment's variables."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from torchdsc.lab import files
from torchdsc.lab.files import (
    draft_beside,
    expand,
    naming_writes,
    new_folder,
    read_json,
    remove_drafts,
    write_atomically,
    write_json,
    write_text,
)

KILLED = """
import os, signal, sys
from pathlib import Path
from torchdsc.lab.files import draft_beside, write_atomically

def half(file):
    file.write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

target = Path(sys.argv[1])
if sys.argv[2] == "file":
    write_atomically(target, half)
with draft_beside(target, is_folder=True) as draft, (draft / "part").open("wb") as file:
    half(file)
"""


@pytest.fixture
def killed(tmp_path):
    """Leaves the draft of a process that was killed while it wrote: returns it."""

    def kill(name, kind="file"):
        before = set(tmp_path.iterdir())
        done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / name), kind], check=False)
        assert done.returncode == -signal.SIGKILL
        (draft,) = set(tmp_path.iterdir()) - before
        return draft

    return kill


class TestWriteAtomically:
    def test_writes_and_leaves_nothing_beside(self, tmp_path):
        target = tmp_path / "new" / "file"
        write_atomically(target, lambda file: file.write(b"one"))
        write_atomically(target, lambda file: file.write(b"two"))
        assert target.read_bytes() == b"two"
        assert [path.name for path in target.parent.iterdir()] == ["file"]

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_interruption_keeps_the_former_file(self, tmp_path, error):
        def interrupted(file):
            file.write(b"half")
            raise error

        target = tmp_path / "file"
        write_atomically(target, lambda file: file.write(b"whole"))
        with pytest.raises(error):
            write_atomically(target, interrupted)
        assert target.read_bytes() == b"whole"
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_full_disk_is_named(self, tmp_path, monkeypatch):
        def full(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(files.os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*/table.md'$"):
            write_text(tmp_path / "table.md", "text")
        assert list(tmp_path.iterdir()) == []


class TestDrafts:
    @pytest.mark.parametrize("kind", ["file", "folder"])
    def test_of_a_killed_process_are_removed(self, tmp_path, killed, kind):
        draft = killed("table.md", kind)
        assert draft.name.startswith(".table.md.")
        # Any file that is written there will do: the one that was cut off may never be again.
        write_text(tmp_path / "other", "text")
        assert [path.name for path in tmp_path.iterdir()] == ["other"]

    @pytest.mark.parametrize("is_folder", [False, True])
    def test_of_a_live_process_are_left(self, tmp_path, is_folder):
        with draft_beside(tmp_path / "train.bin", is_folder=is_folder) as draft:
            remove_drafts(tmp_path)
            write_text(tmp_path / "other", "text")
            assert draft.exists()
        assert [path.name for path in tmp_path.iterdir()] == ["other"]

    def test_names_of_others_are_left(self, tmp_path):
        names = [".table.md.swp", ".hidden", "table.md.abcdefgh.tmp", ".a.tmp", ".settings.json.disabled"]
        for name in names:
            (tmp_path / name).write_text("mine")
        remove_drafts(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)

    def test_one_that_is_taken_before_it_is_locked_is_made_again(self, tmp_path, monkeypatch):
        made = []
        mkstemp = files.tempfile.mkstemp

        def taken(**names):
            descriptor, name = mkstemp(**names)
            made.append(name)
            if len(made) == 1:
                Path(name).unlink()
            return descriptor, name

        monkeypatch.setattr(files.tempfile, "mkstemp", taken)
        write_text(tmp_path / "file", "text")
        assert len(made) == 2
        assert (tmp_path / "file").read_text() == "text"

    def test_where_files_cannot_be_locked(self, tmp_path, killed, monkeypatch):
        draft = killed("table.md")
        monkeypatch.setitem(sys.modules, "fcntl", None)
        write_text(tmp_path / "table.md", "text")
        assert draft.exists()
        assert (tmp_path / "table.md").read_text() == "text"


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
        import resource

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


def test_json_that_lacks_keys(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1})
    assert read_json(tmp_path / "a.json", keys=["b"]) == {"b": 1}
    with pytest.raises(ValueError, match=r"a\.json is damaged: it lacks c, d; delete it to make it anew"):
        read_json(tmp_path / "a.json", keys=["b", "c", "d"])


class TestNewFolder:
    def test_of_what_fails_is_removed(self, tmp_path):
        seen = []

        def fail():
            with new_folder(tmp_path / "a" / "b"):
                seen.append((tmp_path / "a" / "b").is_dir())
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fail()
        assert (seen, list(tmp_path.iterdir())) == ([True], [])

    def test_stays_with_what_it_holds_or_where_it_was(self, tmp_path):
        (tmp_path / "old").mkdir()

        def fail(name):
            with new_folder(tmp_path / name):
                if name == "new":
                    (tmp_path / name / "file").touch()
                raise KeyboardInterrupt

        for name in ("old", "new"):
            with pytest.raises(KeyboardInterrupt):
                fail(name)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]

    def test_stays_where_all_is_well(self, tmp_path):
        with new_folder(tmp_path / "a"):
            pass
        assert (tmp_path / "a").is_dir()


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_damaged_json(tmp_path, text):
    file = tmp_path / "a.json"
    write_json(file, {"b": 1})
    assert read_json(file) == {"b": 1}
    file.write_text(text)
    with pytest.raises(ValueError, match=r"a\.json is damaged: .*; delete it"):
        read_json(file)


def test_expand(monkeypatch):
    monkeypatch.setenv("SOMEWHERE", "/data")
    monkeypatch.delenv("NOWHERE", raising=False)
    assert expand("${SOMEWHERE}/a.tsv") == expand("$SOMEWHERE/a.tsv") == "/data/a.tsv"
    assert expand("plain/file $ 1.txt") == "plain/file $ 1.txt"
    with pytest.raises(ValueError, match=r"^\$\{NOWHERE\}/a.tsv: the environment variable NOWHERE is not set$"):
        expand("${NOWHERE}/a.tsv")

"""Files that are whole or absent, and sources that name the environment's variables."""

import pytest

from torchdsc.lab.files import expand, new_folder, read_json, write_atomically, write_json


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

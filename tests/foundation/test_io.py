"""Atomic writes, locks, checksums, settings and resumable shards."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from puma.errors import BusyError, DataError, ResumeError, StorageError, UsageError
from puma.io import (
    Shards,
    atomic_path,
    claim_folder,
    lock,
    locked,
    parse_toml,
    prepare_folder,
    read_json,
    settings_diff,
    spans,
    write_json,
    write_text,
)

HOLD = "import sys,time; from puma.io import lock\nwith lock(sys.argv[1]): print('held', flush=True); time.sleep(60)"


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_body_that_raises_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("new" * (1 // (temporary.write_text("half") - 4)))
    assert files(tmp_path) == {"a.txt"}
    assert (tmp_path / "a.txt").read_text() == "old"


def test_settings_are_utf8_whatever_the_locale_says(tmp_path: Path) -> None:
    write_text(tmp_path / "a.toml", 'name = "größer"')
    code = "import sys; from puma.io import read_toml; print(ascii(read_toml(sys.argv[1])['name']))"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, str(tmp_path / "a.toml")]
    result = subprocess.run(command, env=os.environ | locale, capture_output=True, text=True, check=False)
    assert result.stdout == "'gr\\xf6\\xdfer'\n"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EBUSY, errno.ENOSPC])
@pytest.mark.parametrize("call", ["rename", "fsync"])
def test_errors_of_the_storage_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*((Path, "replace") if call == "rename" else (os, "fsync")), fail)
    with pytest.raises(StorageError, match=r"a\.txt") as caught:
        write_text(tmp_path / "a.txt", "x")
    assert caught.value.exit_code == 6
    assert caught.value.fix
    assert files(tmp_path) == set()


def test_errors_of_what_is_read_are_not_told_as_errors_of_the_target(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileNotFoundError) as caught, atomic_path(tmp_path / "out" / "a.txt") as temporary:
        temporary.write_bytes((tmp_path / "source.npz").read_bytes())
    assert "source.npz" in str(caught.value)
    with pytest.raises(FileNotFoundError), lock(tmp_path / "out"):
        (tmp_path / "source.npz").read_bytes()
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        write_text(tmp_path / "file" / "b" / "a.txt", "x")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_fsync_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    write_text(tmp_path / "a.txt", "x")
    assert (tmp_path / "a.txt").read_text() == "x"


def test_links_are_not_written_through(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("precious")
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.txt").symlink_to(theirs)
    write_text(out / "a.txt", "ours")  # the link is replaced
    assert not (out / "a.txt").is_symlink()
    (out / ".lock").symlink_to(theirs)
    with pytest.raises(StorageError, match="lock"), lock(out):
        pass
    assert theirs.read_text() == "precious"


def test_devices_and_pipes_are_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(StorageError, match="device or a pipe"):
        write_text(tmp_path / "a.txt", "x")
    assert stat.S_ISFIFO((tmp_path / "a.txt").stat().st_mode)


def test_leftovers_of_killed_processes_go_and_those_of_live_ones_stay(tmp_path: Path) -> None:
    code = (
        "import os,sys; from puma.io import atomic_path\n"
        "with atomic_path(sys.argv[1]) as t: t.write_text('half'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.txt")], check=False)
    (killed,) = files(tmp_path)
    for name, age in ((".new.ffffff-1-ab.tmp", 0), (".old.ffffff-1-ab.tmp", 2 * 86_400), (".notes.tmp", 2 * 86_400)):
        (tmp_path / name).touch()  # of other machines, and of somebody else's program
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with atomic_path(tmp_path / "b.txt") as temporary:
        temporary.write_text("x")
        prepare_folder(tmp_path)
        assert temporary.exists()
    assert files(tmp_path) == {"b.txt", ".new.ffffff-1-ab.tmp", ".notes.tmp"}, killed


def test_a_lock_names_its_owner_and_ends_with_it(tmp_path: Path) -> None:
    assert not locked(tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match=rf"pid {other.pid} on "), lock(tmp_path):
            pass
        assert locked(tmp_path)
        other.kill()
    with lock(tmp_path):
        assert locked(tmp_path)
    assert not locked(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    import fcntl

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(StorageError, match="without locks"), lock(tmp_path):
        pass


def test_json_with_a_checksum_does_not_read_when_a_bit_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"accuracy": 0.1 + 0.2, "counts": {1: (2, 3)}}, checksum=True)
    assert read_json(path) == {"accuracy": 0.1 + 0.2, "counts": {"1": [2, 3]}}
    path.write_text(path.read_text().replace("0.30000000000000004", "0.31000000000000004"))
    with pytest.raises(DataError, match="damaged"):
        read_json(path)


def test_nested_json_and_toml_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 1_000_000)
    started = time.monotonic()
    with pytest.raises(DataError, match="nested"):
        read_json(tmp_path / "a.json")
    for text in ("a=" + "[" * 100_000, ".".join("a" * 100_000) + "=1", "[" + ".".join("a" * 100_000) + "]"):
        with pytest.raises(UsageError, match=r"a\.toml"):
            parse_toml(text, "a.toml")
    with pytest.raises(UsageError, match="large"):
        parse_toml("a = 1\n" * 100_000, "a.toml")
    assert time.monotonic() - started < 1


def test_settings_diff_names_both_values() -> None:
    there = {"a": 1, "b": {"c": [1, 2], "d": None}, "sha": "0" * 64, "gone": True}
    now = {"a": 1, "b": {"c": (1, 3), "d": 0.5}, "sha": "1" * 64}
    assert settings_diff(there, now) == [
        "b.c: [1, 2] there, [1, 3] now",
        "b.d: none there, 0.5 now",
        "gone: True there, none now",
        "sha: '000000000000...' there, '111111111111...' now",
    ]


def test_a_folder_of_other_settings_is_refused_and_another_machine_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert claim_folder(tmp_path, {"rows": (1, 2)}, environment={"torch": "2.10"}, schema="x/1") == []
    assert claim_folder(tmp_path, {"rows": (1, 2)}, environment={"torch": "2.10", "new": 1}, schema="x/1") == []
    with pytest.raises(ResumeError, match=r"rows: \[1, 2\] there, \[1, 3\] now"):
        claim_folder(tmp_path, {"rows": (1, 3)}, schema="x/1")
    with pytest.raises(ResumeError, match="schema: 'x/1' there, 'y/1' now"):
        claim_folder(tmp_path, {"rows": (1, 2)}, schema="y/1")
    with caplog.at_level(logging.WARNING):
        assert claim_folder(tmp_path, {"rows": (1, 2)}, environment={"torch": "2.11"}, schema="x/1")
    assert "torch: '2.10' there, '2.11' now" in caplog.text


def test_shards_are_made_once_and_again_where_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = Shards(tmp_path, {"seed": 0}, suffix=".txt")
    for key in (0, "alpha-5"):
        with shards.writing(key) as temporary:
            temporary.write_text(f"content {key}")
    again = Shards(tmp_path, {"seed": 0}, suffix=".txt")
    assert again.missing([0, 1]) == [1]
    assert again.finished("alpha-5")
    assert (tmp_path / "part-000000.txt").read_text() == "content 0"
    (tmp_path / "part-000000.txt").write_text("content 1")
    assert not again.finished(0)
    assert "part-000000.txt is damaged" in caplog.text
    with pytest.raises(ResumeError, match="seed: 0 there, 1 now"):
        Shards(tmp_path, {"seed": 1}, suffix=".txt", write=False)


def test_a_shard_that_is_replaced_is_whole_at_every_moment(tmp_path: Path) -> None:
    shards = Shards(tmp_path, {}, suffix=".txt")
    with shards.writing(0) as temporary:
        temporary.write_text("after the first attack")
    with pytest.raises(ZeroDivisionError), shards.writing(0) as temporary:
        temporary.write_text("new" * (1 // (temporary.write_text("half") - 4)))
    assert shards.finished(0)
    before = shards.path(0).read_text()
    with shards.writing(0) as temporary:
        temporary.write_text("after the second")
    assert shards.finished(0)
    shards.path(0).write_text(before)  # as if killed between the two renames
    assert shards.finished(0)


def test_shards_without_checksums_are_made_again(tmp_path: Path) -> None:
    (tmp_path / "part-000000.txt").write_text("copied")
    assert Shards(tmp_path, {}, suffix=".txt").missing([0]) == [0]


def test_workers_hold_their_own_places_of_one_division(tmp_path: Path) -> None:
    shards = Shards(tmp_path, {})
    with shards.held(0, 2), shards.held(1, 2):
        for place in ((0, 2), (0, 1), (0, 3)):
            with pytest.raises(BusyError), shards.held(*place):
                pass
    with shards.held(0, 3):
        pass


def test_looking_at_shards_writes_nothing(tmp_path: Path) -> None:
    assert Shards(tmp_path / "new", {}, write=False).missing([0]) == [0]
    assert not (tmp_path / "new").exists()


def test_spans_cover_every_row_once() -> None:
    assert [row for span in spans(10, 3) for row in span] == list(range(10))
    assert spans(0, 3) == []


def test_records_are_json_that_people_can_read(tmp_path: Path) -> None:
    claim_folder(tmp_path, {"steps": 3}, schema="puma.test/1")
    value = json.loads((tmp_path / "settings.json").read_text())
    assert (value["schema"], value["settings"]) == ("puma.test/1", {"steps": 3})

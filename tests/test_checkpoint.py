"""Check that checkpoints are written atomically; damaged or malicious ones are refused without running their code."""

import copy
import errno
import hashlib
import io
import itertools
import json
import os
import shutil
import stat
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from writing_runs import content, filled

from sasa_train import files
from sasa_train.files import write_atomic
from sasa_train.refusal import ConfigError
from sasa_train.runs import checkpoint
from sasa_train.runs.checkpoint import FORMAT_VERSION, CheckpointError, Checkpoints, load_checkpoint


def newest_step(folder, keep=2) -> tuple[int, list[str]]:
    warnings: list[str] = []
    found = Checkpoints(folder, keep).newest(warnings.append)
    return found["step"], warnings


def flip_a_bit(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_last_best_and_the_newest_few_are_kept(tmp_path):
    filled(tmp_path)
    names = ["best.pt", "last.pt", "step-00000003.pt", "step-00000004.pt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names, *(f"{name}.json" for name in names)])
    steps = {name: load_checkpoint(tmp_path / name)["step"] for name in names}
    assert steps == {"best.pt": 2, "last.pt": 5, "step-00000003.pt": 3, "step-00000004.pt": 4}


def test_a_resumed_run_keeps_its_last_checkpoint_too(tmp_path):
    filled(tmp_path, steps=(1, 2))
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.newest(print)
    checkpoints.save(content(3), is_best=False)
    assert [p.name for p in checkpoints.numbered()] == ["step-00000002.pt", "step-00000001.pt"]


def test_saving_the_same_step_again_makes_no_second_copy(tmp_path):
    filled(tmp_path, steps=(7, 7))
    assert [p.name for p in tmp_path.glob("*.pt")] == ["last.pt"]


def test_numbered_checkpoints_are_ordered_as_numbers(tmp_path):
    for name in ("step-9.pt", "step-10.pt", "step-x.pt"):
        (tmp_path / name).touch()
    assert [p.name for p in Checkpoints(tmp_path, 3).numbered()] == ["step-10.pt", "step-9.pt"]


@pytest.mark.parametrize("damage", [lambda p: os.truncate(p, 900), flip_a_bit, lambda p: p.write_bytes(b"")])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, damage):
    filled(tmp_path)
    damage(tmp_path / "last.pt")
    step, warnings = newest_step(tmp_path)
    assert step == 4 and len(warnings) == 2 and "last.pt" in warnings[0]
    assert "going on from" in warnings[1] and "step-00000004.pt, step 4, the newest good one" in warnings[1]


@pytest.mark.parametrize("damage", [lambda p: os.truncate(p, 50), os.unlink])
def test_with_no_good_checkpoint_nothing_begins_anew(tmp_path, damage):
    filled(tmp_path)
    for path in tmp_path.glob("*.pt"):
        damage(path)
    with pytest.raises(CheckpointError, match="none of its checkpoints can be read"):
        newest_step(tmp_path)
    assert Checkpoints(tmp_path / "elsewhere", 2).newest(print) is None


def test_what_a_killed_save_left_aside_is_swept(tmp_path):
    filled(tmp_path)
    (tmp_path / "last.pt.0123abcd.tmp").write_bytes(b"half")
    (tmp_path / "notes.tmp").write_text("the user's own")
    assert newest_step(tmp_path) == (5, []) and [path.name for path in tmp_path.glob("*.tmp")] == ["notes.tmp"]


def test_what_a_save_could_not_delete_the_next_save_deletes(tmp_path, monkeypatch):
    """A temporary file of the size of a checkpoint was once left on a full disk until the next start."""
    checkpoints = filled(tmp_path)
    with monkeypatch.context() as patch:
        for name in ("fsync", "unlink"):
            patch.setattr(os, name, full)
        with pytest.raises(CheckpointError, match="No space left on device.*earlier ones are untouched"):
            checkpoints.save(content(6), is_best=True)
    assert list(tmp_path.glob("*.tmp"))
    checkpoints.save(content(6), is_best=True)
    assert newest_step(tmp_path) == (6, []) and not list(tmp_path.glob("*.tmp"))


def test_a_write_in_the_place_of_a_folder_leaves_nothing(tmp_path):
    """Each start once left another index of shards beside a folder with the index's name."""
    (tmp_path / "index.npz").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomic(tmp_path / "index.npz", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["index.npz"]


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    checkpoints = filled(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left on device.*earlier ones are untouched"):
            checkpoints.save(content(6), is_best=False)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert newest_step(tmp_path) == (5, [])


def test_a_disk_that_ends_in_the_middle_of_a_file_is_named(tmp_path):
    """A file size limit simulates a full disk: the write itself fails, inside torch.save."""
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
from pathlib import Path
from sasa_train.runs.checkpoint import CheckpointError
from writing_runs import filled
try:
    filled(Path({str(tmp_path)!r}))
except CheckpointError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert "cannot write a checkpoint of 0 MB (File too large)" in out.stdout, out
    assert list(tmp_path.iterdir()) == []


def test_room_is_looked_for_before_anything_is_written(tmp_path, monkeypatch):
    checkpoints = filled(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    monkeypatch.setattr("sasa_train.runs.checkpoint.write_aside", pytest.fail)
    big = content(6) | {"model": {"weight": torch.zeros(2_000_000)}}
    with pytest.raises(CheckpointError, match="a checkpoint of 8 MB .0 MB are free"):
        checkpoints.save(big, is_best=True)


def test_best_is_a_copy_where_the_disk_has_no_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", full)
    filled(tmp_path, steps=(1, 2), best=(2,))
    flip_a_bit(tmp_path / "last.pt")
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 2


@pytest.mark.parametrize("call", ["unlink", "replace", "fsync", "open", "link"])
def test_a_kill_between_any_two_calls_leaves_a_good_newest_checkpoint(tmp_path, call):
    """For each call that changes the folder, kill the process at that call; a new process must be able to continue."""
    reached, is_done = 0, False
    while not is_done:
        folder = tmp_path / f"{call}{reached}"
        checkpoints = filled(folder, steps=(1, 2, 3), keep=1, best=(2,))
        is_done = not dies(partial(checkpoints.save, content(4), is_best=True), call, reached)
        step, warnings = newest_step(folder, keep=1)
        assert step in (3, 4) and not any("damaged" in warning for warning in warnings)
        again = Checkpoints(folder, 1)
        again.newest(lambda _: None)
        again.save(content(5), is_best=False)
        assert newest_step(folder) == (5, [])
        steps = {path.name: load_checkpoint(path)["step"] for path in folder.glob("*.pt")}
        assert all(int(name[5:13]) == step for name, step in steps.items() if name.startswith("step-"))
        reached += 1
    assert reached > 2


def dies(work, call: str, num_calls: int) -> bool:
    """Run `work` in a process that exits at call number `num_calls` (from 0) of os.`call`; return True if it did."""
    process = os.fork()
    if process == 0:
        real, calls = getattr(os, call), itertools.count()
        setattr(os, call, lambda *a, **k: os._exit(9) if next(calls) == num_calls else real(*a, **k))
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9


def failing(real, calls, number: int):
    return lambda *a, **k: full() if next(calls) == number else real(*a, **k)


@pytest.mark.parametrize("call", ["unlink", "replace", "fsync", "open", "link", "scandir"])
def test_a_save_is_written_whole_or_not_at_all(tmp_path, monkeypatch, call):
    """If any call fails, the run goes on from the old last.pt and best.pt, and its next checkpoint is written.

    Otherwise a run that goes on after a failed save would have a best.pt that it does not know, and replace it with a
    worse model.
    """
    reached, is_done = 0, False
    while not is_done:
        folder = tmp_path / f"{call}{reached}"
        checkpoints, calls = filled(folder, steps=(1, 2, 3), keep=2, best=(2,)), itertools.count()
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing(getattr(os, call), calls, reached))
            is_saved = True
            try:
                checkpoints.save(content(4), is_best=True)
            except CheckpointError:
                is_saved = False
            is_done = next(calls) <= reached
        found = {name: load_checkpoint(folder / name)["step"] for name in ("last.pt", "best.pt")}
        assert found == ({"last.pt": 4, "best.pt": 4} if is_saved else {"last.pt": 3, "best.pt": 2})
        assert all((folder / f"{name}.json").exists() for name in found)
        checkpoints.save(content(5), is_best=False)
        assert newest_step(folder)[0] == 5
        steps = {path.name: load_checkpoint(path)["step"] for path in folder.glob("step-*.pt")}
        assert steps and all(int(name[5:13]) == step for name, step in steps.items())
        reached += 1


@pytest.mark.parametrize("name", ["best.pt.json", "last.pt.json"])
def test_a_save_that_cannot_read_a_manifest_changes_nothing(tmp_path, monkeypatch, name):
    """One failed read made the save put best.pt back without its manifest when it failed later."""
    checkpoints, real = filled(tmp_path, steps=(1, 2, 3), keep=2), checkpoint.read_regular
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def failing(path):
        if path.name == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path)

    monkeypatch.setattr(checkpoint, "read_regular", failing)
    with pytest.raises(CheckpointError, match="Input/output error.*earlier ones are untouched"):
        checkpoints.save(content(4), is_best=True)
    copied = () if name == "last.pt.json" else ("step-00000003.pt", "step-00000003.pt.json")  # they are whole
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name not in copied} == before


def test_a_best_checkpoint_that_is_not_the_runs_own_is_named(tmp_path):
    """A backup restored beside a run that goes on, or a deleted best.pt, was not noticed by anything."""
    checkpoints, best = filled(tmp_path, steps=(1, 2, 3, 4), best=(2,)), {"top1": 7.0, "step": 2, "epoch": 1}
    assert checkpoints.other_best(best, 4, 4) is None
    assert checkpoints.other_best({**best, "step": 1}, 1, 1) is None  # killed between best.pt and last.pt
    assert "not the one of step 3 that this run wrote: it is of step 2" in checkpoints.other_best(
        {**best, "step": 3}, 4, 4
    )
    with pytest.raises(ConfigError, match="best.pt is there, of step 2, but last.pt has best=None"):
        checkpoints.other_best(None, 4, 4)
    torch.save(content(2) | {"seconds": 1.0}, tmp_path / "best.pt")
    data = (tmp_path / "best.pt").read_bytes()
    manifest = {"step": 2, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (tmp_path / "best.pt.json").write_text(json.dumps(manifest))
    again = Checkpoints(tmp_path, 2)
    again.newest(print)
    for of_run in (checkpoints, again):
        assert "this run wrote: its SHA-256 is another; bring it back" in of_run.other_best(best, 4, 4)
    (tmp_path / "best.pt.json").unlink()  # its content is then looked at
    assert "this run wrote: its SHA-256 is another; bring it back" in checkpoints.other_best(best, 4, 4)
    assert checkpoints.other_best({**best, "step": 1}, 1, 1) is None
    (tmp_path / "best.pt").write_bytes(b"damaged")
    assert "it cannot be read as a checkpoint" in checkpoints.other_best(best, 4, 4)
    (tmp_path / "best.pt").unlink()
    assert "not the one of step 2 that this run wrote: it is gone" in checkpoints.other_best(best, 4, 4)
    assert checkpoints.other_best(None, 4, 4) is None


def test_what_a_failed_save_cannot_put_back_is_named(tmp_path, monkeypatch):
    checkpoints, calls, real = filled(tmp_path, keep=0), itertools.count(), os.replace
    monkeypatch.setattr(os, "replace", lambda *a: full() if next(calls) >= 2 else real(*a))  # best.pt and its manifest
    with pytest.raises(CheckpointError, match="cannot be put back: .*best.pt .No space left on device"):
        checkpoints.save(content(6), is_best=True)


@pytest.mark.parametrize("has_manifests", [True, False])
def test_a_disk_that_goes_away_in_the_middle_of_a_save_is_not_said_to_hold_the_earlier_files(
    tmp_path, monkeypatch, has_manifests
):
    """Every call failed from one moment on, also those that look at what is there; best.pt was replaced by then."""
    checkpoints = filled(tmp_path, keep=0)
    for manifest in () if has_manifests else tmp_path.glob("*.json"):
        manifest.unlink()
    best = tmp_path / "best.pt"

    def broken(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def break_after(source, target, real=os.replace):
        real(source, target)
        if target == best:
            for name in ("replace", "stat", "unlink", "open", "rename", "link"):
                monkeypatch.setattr(os, name, broken)

    monkeypatch.setattr(os, "replace", break_after)
    with pytest.raises(CheckpointError, match="what it had replaced cannot be put back: .*best.pt .Input/output error"):
        checkpoints.save(content(6), is_best=True)
    monkeypatch.undo()
    assert load_checkpoint(best)["step"] == 6  # without a manifest; step 2 was the best
    again = Checkpoints(tmp_path, 0)
    again.newest(print)
    assert again.other_best({"top1": 7.0, "step": 2, "epoch": 1}, 5, 5) is None  # of a later step, as after a kill


@pytest.mark.parametrize("numbers", [[[0, 2], [1]], [["0", "1"]], [[0, 0]], [None], [[torch.ones(2)]]])
def test_an_optimizer_whose_parameters_are_numbered_otherwise_is_refused(tmp_path, numbers):
    """torch gave the momentum to other parameters, or dropped it, without a word."""
    wrong = content(3)
    wrong["optimizer"]["param_groups"] = [{"params": of_group, "lr": 0.1} for of_group in numbers]
    torch.save(wrong, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="must number them 0, 1, 2, ..."):
        load_checkpoint(tmp_path / "last.pt")


def test_a_damaged_manifest_counts_as_a_damaged_checkpoint(tmp_path):
    filled(tmp_path)
    (tmp_path / "last.pt.json").write_text('{"size": 1')
    assert newest_step(tmp_path)[0] == 4


def test_a_checkpoint_without_its_manifest_is_judged_by_its_own_checksums(tmp_path):
    """Check that a checkpoint that was copied without its manifest is verified against its own checksums."""
    filled(tmp_path)
    os.rename(tmp_path / "last.pt", tmp_path / "copy.pt")
    assert load_checkpoint(tmp_path / "copy.pt")["step"] == 5
    flip_a_bit(tmp_path / "copy.pt")
    with pytest.raises(CheckpointError, match="does not match|cannot be read as"):
        load_checkpoint(tmp_path / "copy.pt")


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 1])
def test_another_format_is_refused_and_no_reason_to_go_back(tmp_path, version):
    filled(tmp_path)
    torch.save(content(6) | {"format_version": version}, tmp_path / "last.pt")
    (tmp_path / "last.pt.json").unlink()
    with pytest.raises(CheckpointError, match=f"has format {version}, .*go on with the version that wrote it"):
        newest_step(tmp_path)


def test_a_disk_that_cannot_be_read_now_is_no_damage(tmp_path):
    """Check that a temporary read error is not treated as damage: using an older checkpoint would lose work."""
    filled(tmp_path)
    (tmp_path / "last.pt").unlink()
    (tmp_path / "last.pt").mkdir()
    with pytest.raises(CheckpointError, match="last.pt: cannot be read .Is a directory"):
        newest_step(tmp_path)


def test_damaged_checkpoints_are_kept_aside_and_do_not_push_out_new_ones(tmp_path):
    checkpoints = filled(tmp_path, steps=range(1, 6), keep=3)
    for name in ("last.pt", "step-00000004.pt", "step-00000003.pt"):
        flip_a_bit(tmp_path / name)
    assert newest_step(tmp_path, keep=3)[0] == 2
    assert len(list(tmp_path.glob("*.damaged"))) == 3
    checkpoints = Checkpoints(tmp_path, 3)
    checkpoints.newest(print)
    for step in (3, 4, 5):
        checkpoints.save(content(step), is_best=False)
    names = ["step-00000004.pt", "step-00000003.pt", "step-00000002.pt"]
    assert [path.name for path in checkpoints.numbered()] == names


def test_the_newest_is_the_one_of_the_highest_step(tmp_path):
    """Check that the checkpoint with the highest step number is used if last.pt is lost and best.pt is newer."""
    filled(tmp_path, steps=(1, 2, 3), keep=1, best=(3,))
    (tmp_path / "last.pt").unlink()
    assert newest_step(tmp_path)[0] == 3


@pytest.mark.parametrize("name,step", [("step-00000001.pt", 9), ("best.pt", 9), ("last.pt", 1)])
def test_a_wrong_step_in_a_manifest_puts_no_older_checkpoint_in_the_place_of_last_pt(tmp_path, name, step):
    """A flipped bit had the run go on from the older one, "the newest good one", and lose last.pt."""
    filled(tmp_path, steps=(1, 2, 3), keep=3, best=(1,))
    manifest = tmp_path / f"{name}.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"step": step}))
    assert newest_step(tmp_path) == (3, [])


def test_a_compressed_file_is_refused_unread(tmp_path):
    """Check that compressed files are refused without being read, as a few KB could expand to terabytes in memory."""
    torch.save(content(1), tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        load_checkpoint(tmp_path / "bomb.pt")


def test_a_hostile_pickle_does_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save(content(1) | {"bomb": Bomb()}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="last.pt: cannot be read as a checkpoint"):
        load_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "ran").exists()


def test_another_programs_file_is_no_checkpoint(tmp_path):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="is not a checkpoint of sasa_train"):
        load_checkpoint(tmp_path / "x.pt")


def log(*rows: tuple[int, str], **values) -> str:
    """Return metrics with these steps and splits."""
    return "".join(
        json.dumps({"split": split, "step": step, "epoch": 1, "top1": 9.0} | values) + "\n" for step, split in rows
    )


@pytest.mark.parametrize(
    "part,value",
    [
        ("best", "text"), ("best", {"top1": float("nan"), "step": 1, "epoch": 1}), ("best", {"top1": 50.0}),
        ("step", -1), ("step", 2**63), ("step", True), ("epoch", 9), ("evaluated_step", 6), ("seconds", float("nan")),
        ("fingerprint", {}), ("fingerprint.val", {}), ("fingerprint.train.source", "tape"), ("provenance", 3),
        ("provenance.teacher_sha256", 5),
        ("provenance.world_size", "two"), ("provenance.versions", ["torch"]), ("classes", []), ("classes", [1]),
        ("provenance.imports", 5),
        ("metrics", "x"), ("metrics", '{"split": "val", "step": 1, "epoch": 1, "top1": NaN}\n'), ("window", {}),
        ("window", {"sums": torch.tensor([1e300, 0.0]).double(), "num_images": 4}),
        ("window.num_images", -1), ("window.sums", torch.zeros(3, 2).double()), ("rng.torch", torch.zeros(9)),
        ("model", {3: 4}), ("model.weight", torch.zeros(1).expand(10**12)),
        ("optimizer.state", torch.zeros(2, device="meta")), ("classes", ["a" * 5000]), ("seconds", 1.7e308),
        ("window.sums", torch.tensor([float("nan"), 0.0]).double()), ("window.sums", torch.tensor([0.0, 1.0]).double()),
        ("window.sums", torch.tensor([1.0, 0.0]).double()), ("metrics", log((2, "train"), (2, "train"))),
        ("metrics", log((3, "train"), (2, "train"))), ("metrics", log((2, "val"), (2, "train"))),
        ("metrics", log((2, "train"), lr=1.7e308)), ("metrics", log((2, "train"), top1=101)),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_whole_but_wrong_inside_is_refused_by_the_part(tmp_path, part, value):
    """A wrong step led to a training with negative learning rates, and other wrong parts to tracebacks."""
    whole = copy.deepcopy(content(5))
    *folders, last = part.split(".")
    inside = whole
    for name in folders:
        inside = inside[name]
    inside[last] = value
    torch.save(whole, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=rf"x.pt: is not a checkpoint of sasa_train .{part}"):
        load_checkpoint(tmp_path / "x.pt")


def test_a_text_that_is_stored_once_and_used_often_is_refused_at_once(tmp_path):
    """The files are of 5 MB; what they stand for was checked, compared or printed for minutes."""
    long = ["a" * 5_000_000] * 20_000
    for changes in (
        {"classes": long},
        {"provenance": {"x": long}},
        {"provenance": {"x": [[["a"] * 1000] * 1000] * 1000}},
    ):
        torch.save(content(5) | changes, tmp_path / "x.pt")
        before = time.process_time()
        with pytest.raises(CheckpointError, match="x.pt: is not a checkpoint of sasa_train") as error:
            load_checkpoint(tmp_path / "x.pt")
        assert time.process_time() - before < 10 and len(str(error.value)) < 1000


def test_tensors_that_share_their_memory_are_refused_before_an_optimizer_copies_each(tmp_path):
    """Entries of one 20 MB tensor of bytes became a float32 tensor each: 22 MB of file took 7 GB of memory."""
    shared = {"state": {0: {f"x{i}": torch.zeros(20_000, dtype=torch.uint8) for i in range(3)}}, "param_groups": []}
    torch.save(content(5) | {"optimizer": shared}, tmp_path / "x.pt")
    assert load_checkpoint(tmp_path / "x.pt")["step"] == 5
    big = torch.zeros(20_000_000, dtype=torch.uint8)
    shared["state"] = {0: {f"x{i}": big for i in range(40)}}
    torch.save(content(5) | {"optimizer": shared}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"its tensors are 3,200,\d{3},\d{3} bytes when loaded, and share 20,0"):
        load_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("manifest", ['{"step": 1e999, "size": 9, "sha256": ""}', "[" * 5000, '{"step": "5"}'])
def test_a_manifest_of_other_parts_is_damage(tmp_path, manifest):
    filled(tmp_path)
    (tmp_path / "last.pt.json").write_text(manifest)
    step, warnings = newest_step(tmp_path)
    assert step == 4 and "its manifest is damaged" in warnings[0]


def test_a_restore_keeps_the_manifest_though_the_folder_cannot_be_synced(tmp_path, monkeypatch):
    checkpoints = filled(tmp_path, steps=(1, 2), keep=0)
    before = (tmp_path / "last.pt").read_bytes(), (tmp_path / "last.pt.json").read_bytes()

    def failing(folder):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder))

    monkeypatch.setattr(checkpoint, "sync_folder", failing)
    monkeypatch.setattr(files, "sync_folder", failing)
    with pytest.raises(CheckpointError):
        checkpoints.save(content(3), is_best=False)
    assert ((tmp_path / "last.pt").read_bytes(), (tmp_path / "last.pt.json").read_bytes()) == before


@pytest.mark.parametrize("has_manifest", [True, False])
@pytest.mark.parametrize("name", ["last.pt", "last.pt.json"])
def test_a_checkpoint_on_a_disk_that_fails_for_a_moment_is_not_damaged(tmp_path, monkeypatch, name, has_manifest):
    """One failed read, wherever it comes, made a resume put intact checkpoints aside or step back in silence."""
    checkpoints, real, counts = filled(tmp_path), checkpoint.open_regular, list[int]()
    if not has_manifest:
        (tmp_path / "last.pt.json").unlink()

    class Failing(io.FileIO):
        def readinto(self, buffer):
            self.count()
            return super().readinto(buffer)

        def readall(self):
            self.count()
            return super().readall()

        def count(self):
            counts[0] -= 1
            if counts[0] == 0:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def failing(path, *rest):
        return io.BufferedReader(Failing(path)) if Path(path).name == name else real(path, *rest)

    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(checkpoint, "open_regular", failing)
    monkeypatch.setattr(files, "open_regular", failing)
    num_failed = 0
    for nth in itertools.count(1):
        counts[:] = [nth]
        try:
            found = checkpoints.newest(pytest.fail)
        except CheckpointError as error:
            assert "cannot be read (Stale file handle)" in str(error)
            num_failed += 1
        else:
            assert found["step"] == 5
            if counts[0] > 0:  # it needed fewer reads
                break
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert num_failed or (name, has_manifest) == ("last.pt.json", False)


def test_what_a_run_goes_on_from_is_last_pt_again(tmp_path):
    filled(tmp_path, steps=(1, 2, 3), keep=2, best=())
    (tmp_path / "last.pt").unlink()
    assert newest_step(tmp_path)[0] == 2
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 2


def test_a_file_system_that_cannot_sync_folders_is_used(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert newest_step(filled(tmp_path, steps=(1, 2)).folder)[0] == 2

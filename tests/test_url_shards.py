"""Check that shards behind a URL train as the same shards on disk, and how runs end if their server fails."""

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from marking import slow_but_for
from reading_runs import assert_same_run, rows
from running_commands import TINY, kill_after
from serving_files import served

from sasa_train.config.keys import DataConfig
from sasa_train.data.datasets import load_image_sets, load_val_set
from sasa_train.data.urls import ServerError
from sasa_train.dataset_tool.prepare import shard
from sasa_train.refusal import ConfigError

pytest.importorskip("aiohttp", reason="needs the extra url: pip install 'sasa_train[url]'")


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("sasa_train.data.urls.PAUSES", (0.01, 0.01))
    monkeypatch.setattr("sasa_train.data.urls.SILENCE", 0.5)
    from sasa_train.data.urls import _files

    _files.cache_clear()


@pytest.fixture
def shards(image_folder, tmp_path) -> Path:
    """Make shards with their indexes: 18 train images in 4 shards and 8 val images in 2."""
    shard(image_folder, tmp_path / "shards", images_per_shard=5)
    load_image_sets(DataConfig("image_folder", root=str(tmp_path / "shards")))
    return tmp_path / "shards"


@pytest.fixture
def server(shards) -> Iterator:
    with served(shards) as server:
        yield server


def remote(server, **keys) -> DataConfig:
    return DataConfig("image_folder", root=server.url, **keys)


def of_images(command: str, path: str, given: str | None) -> bool:
    """Whether a request is for an image, and not for the byte by which ranges are tried out."""
    return command == "GET" and path.endswith(".tar") and given != "bytes=1-1"


def of_train(command: str, path: str, given: str | None) -> bool:
    return of_images(command, path, given) and "/train" in path


RUN = (*TINY, "data=image_folder", "data.image_size=16", "data.resident=false", "trainer.global_batch_size=6")
OFTEN = ("trainer.checkpoint_every_steps=1",)


@pytest.mark.parametrize("num_workers", slow_but_for([3], [0, 3]))
def test_a_killed_run_on_a_url_ends_as_one_on_the_disk_never_touched(server, tmp_path, in_process, num_workers):
    in_process("train", *RUN, "data.root=shards", "run_name=disk")
    own = [*RUN, *OFTEN, f"data.root={server.url}", "run_name=url", f"data.num_workers={num_workers}"]
    kill_after(4, tmp_path / "out/url", *own)
    said = in_process("train", *own).stdout
    assert "continues   at step" in said and "18 train and 8 val images" in said
    assert_same_run(tmp_path / "out/url", tmp_path / "out/disk")  # the fingerprints, too
    assert all(given for command, path, given in server.asked if command == "GET" and path.endswith(".tar"))
    top1 = f"top1   {rows(tmp_path / 'out/url')[-1]['top1']:.2f}\n"
    assert top1 in in_process("evaluate", "out/url/checkpoints/last.pt").stdout


def test_a_run_ends_if_its_server_fails_and_goes_on_once_it_is_back(server, tmp_path, in_process):
    """Counted as damaged, the images would have been replaced by others, and the run another one than on a disk."""
    in_process("train", *RUN, "data.root=shards", "run_name=disk")
    own = [*RUN, *OFTEN, f"data.root={server.url}", "run_name=url"]
    for num_workers, fault in ((2, "stall"), (0, "break off")):
        asked = iter(range(10**6))
        server.fault_of = lambda *request, n=asked, f=fault: f if of_train(*request) and next(n) > 55 else None
        start = time.monotonic()
        said = in_process("train", *own, f"data.num_workers={num_workers}", expect=1).stderr
        assert "train-00000" in said and "the server failed 3 times" in said and "once it answers" in said
        assert time.monotonic() - start < 60 and rows(tmp_path / "out/url")
    server.fault_of = lambda *_: None
    assert "continues   at step" in in_process("train", *own, "data.num_workers=2").stdout
    assert_same_run(tmp_path / "out/url", tmp_path / "out/disk")


def test_short_faults_and_redirects_pass_unnoticed(server, shards):
    faults = iter(["redirect", "break off", None, 500, "redirect", None, "stall"] + [None] * 10**4)
    server.fault_of = lambda *request: next(faults) if of_images(*request) else None
    behind, on_disk = load_image_sets(remote(server)), load_image_sets(DataConfig("image_folder", root=str(shards)))
    for one, other in zip(behind, on_disk, strict=True):
        assert one.labels.tolist() == other.labels.tolist() and one.classes == other.classes
        assert [one.read_bytes(i) for i in range(len(one))] == [other.read_bytes(i) for i in range(len(other))]
    assert len(load_image_sets(remote(server, holdout_fraction=0.3))[1]) == 5
    assert len(load_val_set(remote(server), ["blue", "red"])) == 8


def test_a_server_that_ignores_ranges_is_refused_before_a_shard_is_read(server):
    server.fault_of = lambda *_: "ignore ranges"
    with pytest.raises(ConfigError, match=r"000.tar: the server does not send parts of a file \(HTTP ranges\)"):
        load_image_sets(remote(server))
    server.asked.clear()
    server.fault_of = lambda *_: "stall"
    with pytest.raises(ServerError, match="train.index.npz: the server failed 3 times"):
        load_image_sets(remote(server))


def test_an_index_that_is_missing_or_of_other_shards_is_refused(server, shards):
    tar, index = shards / "train/train-000001.tar", shards / "train/train.index.npz"
    whole, written = tar.read_bytes(), index.read_bytes()
    tar.write_bytes(whole + b"\0" * 512)
    with pytest.raises(ConfigError, match="other shards: .*001.tar has 20,480 bytes there, but 20,992 on the server"):
        load_image_sets(remote(server))
    tar.unlink()
    with pytest.raises(ConfigError, match="001.tar has 20,480 bytes there, but is missing; upload the shards"):
        load_image_sets(remote(server))
    tar.write_bytes(whole)
    index.write_bytes(written[:900])
    with pytest.raises(ConfigError, match=r"train/train.index.npz: is damaged \(.*\); write it again"):
        load_image_sets(remote(server))
    index.rename(shards / "train.index.npz")
    with pytest.raises(ConfigError, match="train.index.npz: is damaged"):
        load_image_sets(remote(server))
    (shards / "train.index.npz").unlink()
    with pytest.raises(ConfigError, match="has no train/train.index.npz; write it with sasa-data verify FOLDER"):
        load_image_sets(remote(server))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.root=https://me:secret@host/x"], "data.root: a URL must not contain a user or a password"),
        (["data.root='https://host/x?key=secret'"], "must be that of a folder, as in https://host/flowers, without"),
        (["data.root=https://"], "must be that of a folder"),
        (["data=cifar10", "data.root=https://host/x"], "is a URL, which imagenet and image_folder alone take"),
    ],
)
def test_urls_with_passwords_and_for_other_sets_are_refused(in_process, overrides, message):
    said = in_process("train", "data=image_folder", *overrides, expect=2)
    assert message in said.stderr and "secret" not in said.stderr + said.stdout


def test_what_is_not_installed_is_said(in_process, monkeypatch):
    said = in_process("train", "data=image_folder", "data.root=abc://host/x", expect=2).stderr
    assert "data.root=abc://host/x: abc cannot be read (Protocol not known: abc" in said
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "aiohttp" else find(name))
    said = in_process("train", "data=image_folder", "data.root=https://host/x", expect=2).stderr
    assert "data.root=https://host/x needs aiohttp, not installed here: pip install 'sasa_train[url]'" in said

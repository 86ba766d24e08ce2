"""Check the help with paths that are not there."""

from sasa_train.files import did_you_mean


def test_a_mistyped_place_names_the_one_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my photos/val").mkdir(parents=True)
    (tmp_path / "my_notes.txt").touch()
    assert did_you_mean("my_photos") == " (did you mean 'my photos'?)"
    assert did_you_mean(tmp_path / "myphotos/val") == f" (did you mean '{tmp_path}/my photos/val'?)"
    assert did_you_mean("my_photos/train") == ""  # no such folder in the similar one either
    assert did_you_mean("somewhere/else") == did_you_mean("my photos") == ""

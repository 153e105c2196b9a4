"""Many pictures in parts: the rows of the single command, whatever the form; jobs that end in the middle go on."""

import json

import pytest

from den import cli
from den.runs import bulk
from tests.served import photographs, store_run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run, and a folder of 23 pictures of which two are none."""
    home = tmp_path_factory.mktemp("parts")
    store_run(home / "run")
    (home / "new" / "deep").mkdir(parents=True)
    for k, picture in enumerate(photographs(21)):
        picture.save(home / "new" / ("deep" if k % 2 else "") / f"{k:02d}.png")
    for name in ("05b.png", "deep/20b.png"):
        (home / "new" / name).write_bytes(b"nothing")
    return home


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(bulk, "PART", 5)


def predict(place, *options) -> int:
    return cli.main(["predict", str(place / "run"), str(place / "new"), "--device", "cpu", *map(str, options)])


@pytest.fixture(scope="module")
def single(place):
    assert predict(place, "--json", place / "all.jsonl") == 0
    return [json.loads(line) for line in (place / "all.jsonl").read_text().splitlines()]


def lines(folder) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob("part-?????.jsonl")) for line in path.open()]


def alike(found: list[dict], wanted: list[dict]) -> None:
    """The same rows; probabilities to the rounding of other batches."""
    assert len(found) == len(wanted)
    for got, row in zip(found, wanted, strict=True):
        exact = {key: value for key, value in row.items() if key not in ("confidence", "top")}
        assert {key: got[key] for key in exact} == exact
        assert [name for name, _ in got["top"]] == [name for name, _ in row["top"]]
        assert [p for _, p in got["top"]] == pytest.approx([p for _, p in row["top"]], abs=1e-5)


def test_parts_hold_the_rows_of_the_single_command_and_name_what_is_broken(place, single, tmp_path, capsys):
    assert predict(place, "--out", tmp_path / "out") == 0
    alike(lines(tmp_path / "out"), single)
    printed = capsys.readouterr()
    assert "23 pictures now, 0 before" in printed.out
    assert "left out 2 of 23 pictures" in printed.err
    broken = [json.loads(line) for path in sorted((tmp_path / "out").glob("*.broken.jsonl")) for line in path.open()]
    assert [row["image"].rpartition("/")[2] for row in broken] == ["05b.png", "20b.png"]
    assert all("no file of JPEG" in row["error"] for row in broken)


def test_parquet_holds_the_same(place, single, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (pip install '.[serve]')")
    assert predict(place, "--out", tmp_path / "out", "--format", "parquet") == 0
    found = [
        row for path in sorted((tmp_path / "out").glob("*.parquet")) for row in parquet.read_table(path).to_pylist()
    ]
    for row in found:
        row["top"] = [[each["label"], each["probability"]] for each in row["top"]]
    alike(found, single)


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_job_that_ends_in_the_middle_goes_on_and_does_nothing_twice(place, single, tmp_path, monkeypatch, capsys, at):
    out, whole, wrote = tmp_path / "out", bulk.write_text, []

    def write(path, text):
        if path.name.startswith("part-") and "broken" not in path.name:
            wrote.append(path.name)
            if len(wrote) == at + 1 and not path.with_name("stop").exists():
                path.with_name("stop").touch()
                raise KeyboardInterrupt
        whole(path, text)

    monkeypatch.setattr(bulk, "write_text", write)
    assert predict(place, "--out", out) == 130
    assert len(list(out.glob("part-?????.jsonl"))) == at
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("part-?????.jsonl")}
    assert predict(place, "--out", out) == 0
    assert f"{23 - 5 * at} pictures now, {5 * at} before" in capsys.readouterr().out
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in out.glob("part-*")}.items()
    assert len(wrote) == 5 + 1
    alike(lines(out), single)
    assert predict(place, "--out", out) == 0
    assert "0 pictures now, 23 before" in capsys.readouterr().out


def test_a_folder_of_another_job_is_refused_and_left_alone(place, tmp_path, capsys):
    out = tmp_path / "out"
    assert predict(place, "--out", out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for options, word in (
        (("--top", 2), "top"),
        (("--task", "digits"), "task"),
        (("--format", "jsonl", "--top", 1), "top"),
    ):
        assert predict(place, "--out", out, *options) == 2
        assert f"of other {word}" in capsys.readouterr().err
    (out / bulk.JOB).unlink()
    assert predict(place, "--out", out) == 2
    assert "without job.json" in capsys.readouterr().err
    (out / bulk.JOB).write_text("[]")
    assert predict(place, "--out", out) == 2
    (out / bulk.JOB).write_bytes(before[bulk.JOB])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("package", ["ray", "pyarrow"])
def test_a_missing_package_is_told_with_the_extra(place, tmp_path, monkeypatch, capsys, package):
    from den.report import predict as command

    monkeypatch.setattr(command, "find_spec", lambda name: None if name == package else object())
    assert predict(place, "--out", tmp_path / "out", "--ray") == 2
    assert f"pip install 'den-kernels[serve]' ({package} is not there)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.release
def test_on_ray_the_rows_are_the_same_and_jobs_go_on(place, single, tmp_path, capsys):
    pytest.importorskip("ray.data", reason="ray is not installed (pip install '.[serve]')")
    out = tmp_path / "out"
    assert predict(place, "--out", out, "--ray", "--workers", 2) == 0
    [*_, last] = sorted(out.glob("part-?????.jsonl"))
    last.unlink()
    assert predict(place, "--out", out, "--ray", "--workers", 2) == 0
    assert "left out 1 of" in capsys.readouterr().err
    alike(lines(out), single)

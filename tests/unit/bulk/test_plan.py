"""The plan of a job: which inputs there are, what their outputs are called, and what counts as finished."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import csv, parquet
from support.cli_support import picture

from std_rt.bulk.manifest import Manifest
from std_rt.bulk.options import BulkOptions
from std_rt.bulk.places import listed
from std_rt.bulk.plan import Wish, items, name_outputs, wishes
from std_rt.core.errors import MediaError, UsageError


def outputs(inputs: list[object], styles: list[Path], taken: dict[str, str] | None = None) -> list[str]:
    found = wishes([str(path) for path in inputs], [str(style) for style in styles])
    return items(found, "", taken or {})["output"].to_pylist()  # type: ignore[no-any-return]


def test_a_folder_is_mirrored(photos: Path, art: Path) -> None:
    (photos / ".hidden.png").touch()
    (photos / "notes.txt").touch()
    assert outputs([photos], [art]) == ["a.png", "b.jpg", "c.png", "more/a.png", "more/d.png"]


def test_each_of_several_styles_has_a_folder(photos: Path, art: Path, tmp_path: Path) -> None:
    twin = picture(tmp_path / "other" / "art.png", 32, 32)
    found = outputs([photos / "a.png"], [art, twin])
    assert found[0] == "art/a.png"
    assert found[1].startswith("art-")
    assert found[1].endswith("/a.png")


def test_the_output_folder_inside_an_input_is_no_input(photos: Path, art: Path) -> None:
    picture(photos / "styled" / "a.png", 8, 8)
    found = wishes([str(photos)], [str(art)], out=str(photos / "styled"))
    assert [wish.name for wish in found] == ["a.png", "b.jpg", "c.png", "more/a.png", "more/d.png"]


def test_a_pattern_is_expanded(photos: Path, art: Path) -> None:
    assert outputs([f"{photos}/**/a.png"], [art])[0].endswith(".png")
    assert len(outputs([f"{photos}/**/*.png"], [art])) == 4
    assert len(outputs([f"{photos}/?.png"], [art])) == 2
    with pytest.raises(MediaError, match="no file matches"):
        outputs([f"{photos}/*.bmp"], [art])


def test_suffixes_that_cannot_be_written_change(tmp_path: Path, art: Path) -> None:
    for name in ("a.HEIC", "b.avi", "c.JPG", "d.mkv"):
        (tmp_path / name).touch()
    found = outputs([tmp_path / name for name in ("a.HEIC", "b.avi", "c.JPG", "d.mkv")], [art])
    assert found == ["a.png", "b.mp4", "c.JPG", "d.mkv"]


def test_names_that_are_alike_are_told_apart_whatever_else_there_is(tmp_path: Path, art: Path) -> None:
    inputs = [picture(tmp_path / name, 8, 8) for name in ("x/a.png", "y/A.png", "z/a.png", "z/b.png")]
    found = outputs([*inputs], [art])
    assert len({name.casefold() for name in found}) == 4
    assert found[3] == "b.png"
    assert outputs([inputs[2], inputs[0]], [art]) == [found[2], found[0]]


def test_a_name_that_an_earlier_run_gave_away_is_not_given_again(tmp_path: Path, art: Path) -> None:
    first, second = (picture(tmp_path / folder / "a.png", 8, 8) for folder in "xy")
    taken = {"a.png": Wish(str(first), str(art), 1.0, "a.png").identity}
    assert outputs([first], [art], taken) == ["a.png"]
    assert outputs([second], [art], taken) != ["a.png"]


def test_a_hash_that_is_not_enough_is_refused() -> None:
    same = Wish("x/a.png", "s.png", 1.0, "a.png")
    with pytest.raises(UsageError, match="two inputs would become"):
        name_outputs([same, same], {})


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_list_pairs_inputs_with_styles_and_strengths(photos: Path, art: Path, kind: str) -> None:
    rows = {"input": ["a.png", "b.jpg", "a.png"], "style": ["../art/art.png", None, "../art/art.png"]}
    rows |= {"strength": [0.5, None, 0.25]}  # type: ignore[dict-item]
    table = pa.table(rows)
    if kind == "csv":
        csv.write_csv(table, photos / "list.csv")
    else:
        parquet.write_table(table, photos / "list.parquet")
    found = wishes([str(photos / f"list.{kind}")], [str(art)], 2.0)
    assert [Path(wish.input).name for wish in found] == ["a.png", "b.jpg", "a.png"]
    assert [wish.strength for wish in found] == [0.5, 2.0, 0.25]
    assert all(Path(wish.style).samefile(art) for wish in found)
    names = name_outputs(found, {})
    assert names[1] == "b.jpg"
    assert len(set(names)) == 3


def test_a_list_of_paths_is_relative_to_itself(photos: Path, art: Path) -> None:
    (photos / "list.txt").write_text(f"a.png\n\nmore/d.png\n{photos / 'c.png'}\n")
    assert outputs([photos / "list.txt"], [art]) == ["a.png", "more/d.png", "c.png"]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", "path\na.png\n", "no column input; it has path"),
        ("a.txt", "\n", "lists nothing"),
        ("a.parquet", "PAR0", "cannot be read as a list"),
        ("b.csv", None, "does not exist"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused(
    tmp_path: Path, art: Path, name: str, content: str | None, problem: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(MediaError, match=problem):
        outputs([tmp_path / name], [art])


def test_an_input_needs_a_style_and_a_folder_pictures(photos: Path, tmp_path: Path, art: Path) -> None:
    with pytest.raises(UsageError, match="has no style; add --style"):
        outputs([photos], [])
    with pytest.raises(MediaError, match="no folder with pictures or clips"):
        outputs([tmp_path / "nowhere"], [art])


def test_a_key_changes_with_all_that_changes_the_picture(photos: Path, art: Path) -> None:
    def key(strength: float = 1.0, **options: object) -> str:
        made_by = BulkOptions(digest="d", **options).made_by()  # type: ignore[arg-type]
        found = wishes([str(photos / "a.png")], [str(art)], strength)
        return str(items(found, made_by, {})["key"][0])

    plain = key()
    assert key(cores=4, bundle="elsewhere") == plain
    others = [key(0.5), key(seed=1), key(size=64), key(steps=2), key(keep_colours=True), key(per_call=1)]
    os.utime(art, ns=(0, 0))
    others.append(key())
    picture(photos / "a.png", 60, 41)
    others.append(key())
    assert len({plain, *others}) == 9


def _result(key: str, output: str, size: int, reason: str = "") -> dict[str, object]:
    names = {"input": f"/in/{output}", "style": "s.png", "strength": 1.0, "output": output, "stage": "read"}
    return names | {"key": key, "bytes": size, "width": 1, "height": 1, "frames": 1, "reason": reason}


def test_finished_is_what_is_recorded_and_there_in_full(tmp_path: Path) -> None:
    manifest = Manifest(str(tmp_path))
    assert not manifest.exists
    manifest.begin()
    manifest.add([_result("k1", "a.png", 3), _result("k2", "b.png", 3), _result("k3", "c.png", 3, "bad")])
    manifest.flush()
    manifest.add([_result("k4", "d.png", 4)])
    manifest.flush()
    (tmp_path / "a.png").write_bytes(b"abc")
    (tmp_path / "b.png").write_bytes(b"ab")
    (tmp_path / "c.png").write_bytes(b"abc")
    again = Manifest(str(tmp_path))
    sizes = listed(str(tmp_path))
    assert again.exists
    assert [again.is_finished(key, sizes) for key in ("k1", "k2", "k3", "k4")] == [True, False, False, False]
    assert '"reason": "bad"' in (tmp_path / "failed.jsonl").read_text(encoding="utf-8")


def test_on_a_full_disk_the_newest_results_make_room_for_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = [tmp_path / f"{index}.png" for index in range(4)]
    manifest = Manifest(str(tmp_path))
    manifest.begin()
    for path in results:
        path.write_bytes(b"abc")
    manifest.add(_result(path.stem, path.name, 3) for path in results)
    write = parquet.write_table

    def on_a_small_disk(table: object, path: object) -> None:
        if results[2].exists():
            raise OSError(errno.ENOSPC, "no space")
        write(table, path)

    monkeypatch.setattr(parquet, "write_table", on_a_small_disk)
    manifest.flush()
    assert manifest.removed == 2
    again = Manifest(str(tmp_path))
    there = listed(str(tmp_path))
    assert [again.is_finished(path.stem, there) for path in results] == [True, True, False, False]
    manifest.flush()
    assert manifest.removed == 2, "they were recorded or removed once"


@pytest.mark.parametrize(("number", "removed"), [(errno.ENOSPC, 2), (errno.EFBIG, 0), (errno.EACCES, 0)])
def test_where_it_does_not_help_few_results_are_removed(
    number: int, removed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(table: object, path: object) -> None:
        raise OSError(number, "no")

    results = [tmp_path / f"{index}.png" for index in range(9)]
    manifest = Manifest(str(tmp_path))
    manifest.begin()
    for path in results:
        path.write_bytes(bytes(200_000))
    manifest.add(_result(path.stem, path.name, 200_000) for path in results)
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "write_table", fails)
        with pytest.raises(MediaError, match="cannot be written"):
            manifest.flush()
    assert sum(path.exists() for path in results) == 9 - removed
    manifest.flush()  # later there is room, and nothing else was lost
    there = listed(str(tmp_path))
    again = Manifest(str(tmp_path))
    assert sum(again.is_finished(path.stem, there) for path in results) == 9 - removed


def test_parts_are_joined_and_read_by_parquet(tmp_path: Path) -> None:
    for size in (1, 2):  # the second run made the same item again
        manifest = Manifest(str(tmp_path))
        manifest.begin()
        manifest.add([_result("k", "a.png", size)])
        manifest.flush()
    manifest = Manifest(str(tmp_path))
    manifest.begin()
    assert len([*(tmp_path / "manifest").iterdir()]) == 1
    rows = parquet.read_table(tmp_path / "manifest").to_pylist()
    assert len(rows) == 1


def test_a_damaged_manifest_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "manifest").mkdir()
    (tmp_path / "manifest" / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(MediaError, match=r"is damaged .* delete it"):
        Manifest(str(tmp_path))

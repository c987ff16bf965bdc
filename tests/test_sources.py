"""Files of rows: a path is a path, and text stays as it is written."""

import bz2
import gzip
import json
import lzma
import os
from types import SimpleNamespace

import datasets
import pytest

from helpers.tiny import data_args

from plumbing import errors, load_dataset, load_rows, sources

ROWS = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def read(path, split="train", **more):
    return load_dataset(str(path), split, **more).to_list()


@pytest.mark.parametrize("name", ["d[1].jsonl", "d?.jsonl", "*.jsonl", "[!d].jsonl", "a b.jsonl",
                                  "{split}.jsonl", "ü 🙂.jsonl", "d[1]/x.jsonl", "a:b.jsonl"])
def test_a_path_is_no_pattern(name, tmp_path):
    path = tmp_path / name
    for other in ("d1.jsonl", "dx.jsonl", "x.jsonl", "d1/x.jsonl"):  # what a pattern would find
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text('{"prompt": "of another file"}\n')
    path.parent.mkdir(exist_ok=True)
    path.write_text(LINES)
    assert read(path) == ROWS


def test_a_folder_with_brackets_has_its_splits(tmp_path, capsys):
    folder = tmp_path / "run[1]*"
    folder.mkdir()
    (folder / "train.tsv").write_text("prompt\tanswer\nNA\t1\n")
    (folder / "test-[2].tsv").write_text("prompt\tanswer\n007\t2\n")
    assert read(folder) == [{"prompt": "NA", "answer": 1}]
    assert read(folder, "test") == [{"prompt": "007", "answer": 2}]
    with pytest.raises(SystemExit):
        read(folder, "dev")
    assert "split dev: cannot be loaded" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["d.JSONL", "d.ndjson", "d.Json", "d.jsonl.gz", "D.JSONL.GZ",
                                  "d.ndjson.bz2", "d.json.xz"])
def test_suffixes(name, tmp_path):
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    (tmp_path / name).write_bytes(
        pack.get((tmp_path / name).suffix.lower(), bytes)(LINES.encode()))
    assert read(tmp_path / name) == ROWS


def test_a_text_file_has_one_prompt_a_line(tmp_path):
    (tmp_path / "d.txt").write_text("\ufeffthe first\n007\n", "utf-8")
    assert read(tmp_path / "d.txt") == [{"prompt": "the first"}, {"prompt": "007"}]


LOOKALIKES = ["007", "NA", "null", "", "2024-01-05", "1e3", "True", "nan"]


@pytest.mark.parametrize("name", ["d.csv", "d.TSV", "d.csv.gz", "folder/train.csv"])
def test_csv_text_stays_as_written(name, tmp_path):
    comma, path = "\t" if "TSV" in name else ",", tmp_path / name
    text = f"prompt{comma}reply{comma}answer\n"
    text += "".join(f'"{word}"{comma}{word}{comma}007\n' for word in LOOKALIKES)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    path = path.parent if name.startswith("folder") else path
    texts = sources.text_columns(SimpleNamespace(prompt_column=None, completion_column="reply"))
    rows = read(path, texts=texts)
    assert [row["prompt"] for row in rows] == [row["reply"] for row in rows] == LOOKALIKES
    assert [row["answer"] for row in rows] == [7] * 8  # as `datasets` reads it


def test_csv_columns_that_are_not_text_follow_datasets(tmp_path):
    (tmp_path / "d.csv").write_text("prompt,answer\na,007\nb,NA\n")
    assert [row["answer"] for row in read(tmp_path / "d.csv")] == [7.0, None]
    (tmp_path / "none.csv").write_text("prompt,answer\n")
    with pytest.raises(SystemExit):
        read(tmp_path / "none.csv")


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "folder/train.jsonl"])
def test_json_text_that_looks_like_a_date_stays_text(name, tmp_path):
    day, time = "2024-01-05", "2024-01-05 10:00:00"
    rows = [{"prompt": day, "answer": time, "n": 1, "nested": [{"content": day, "n": 1.5}]},
            {"prompt": time, "answer": day, "n": 2, "nested": [{"content": time, "n": 2.0}]}]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows) if name == "d.json" else "\n".join(map(json.dumps, rows)))
    path = path.parent if name.startswith("folder") else path
    # Somebody else may have read the same file, and left dates in the cache.
    datasets.load_dataset("json", data_files=str(tmp_path / name), split="train")
    assert read(path) == rows


def test_a_cache_that_cannot_be_written_is_not_used(tmp_path, monkeypatch, capsys):
    (tmp_path / "d.jsonl").write_text(LINES)
    (tmp_path / "file").write_text("")
    refused = str(tmp_path / "file/cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", refused)
    sources.let_datasets_write.cache_clear()
    assert read(tmp_path / "d.jsonl") == ROWS
    assert capsys.readouterr().out == (
        f"note: the cache {refused} cannot be written, so every run reads its datasets anew; set "
        "HF_HOME to a folder that can\n")
    sources.let_datasets_write.cache_clear()


def test_a_download_without_a_cache_names_the_remedy(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(errors, "CACHE", str(tmp_path / "file/hub"))
    monkeypatch.setattr(errors.constants, "HF_HUB_OFFLINE", False)
    assert errors.explain("model", "some/model", OSError("...")) == (
        f"nothing can be downloaded, since the cache {tmp_path}/file/hub cannot be written; set "
        "HF_HOME to a folder that can")
    monkeypatch.setattr(errors, "CACHE", str(tmp_path))
    assert errors.explain("model", "some/model", OSError("...")).startswith("not a local folder")
    assert os.listdir(tmp_path) == ["file"]


def test_rows_keep_the_text_of_the_columns_that_flags_name(world, tmp_path):
    (tmp_path / "d.csv").write_text("q,reply,answer\n007,NA,1\n2024-01-05,True,2\n")
    args = data_args(f"{tmp_path}/d.csv", prompt_column="q", completion_column="reply")
    rows = load_rows(args, "train", world.tokenizer, ["prompt", "completion"], 50)
    assert rows["prompt"][:] == ["007", "2024-01-05"]
    assert rows["completion"][:] == ["NA", "True"] and rows["answer"][:] == [1, 2]

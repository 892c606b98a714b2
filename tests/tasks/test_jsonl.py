"""Files of rows, of every kind that people have, and some that are none."""

from __future__ import annotations

import gzip
import json
import tracemalloc

import pytest

from rlft.core.errors import DataError
from rlft.tasks import gsm8k, jsonl, preferences, prompts

ROW = {"a": 1, "text": "x\u2028y \u00e9"}
LINE = json.dumps(ROW, ensure_ascii=False)


def read(path):
  return [value for _, value in jsonl.rows(path)]


@pytest.mark.parametrize(
  "text",
  [
    "R\nR", "R\r\nR\r\n", "\ufeffR\nR\n", "R\nR\n\n", "R\n\n\nR\n", "R\n  \t\nR\n",
    "\nR\nR", "R\r\n\r\nR\r\n\r\n", "\ufeff\nR\nR",
  ],
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
def test_blank_lines_are_no_rows(tmp_path, text, packed):
  path = tmp_path / "rows"  # no suffix says what it is
  body = text.replace("R", LINE).encode()
  path.write_bytes(gzip.compress(body) if packed else body)
  assert read(path) == [ROW, ROW]


def test_places_are_the_lines_of_the_file(tmp_path):
  path = tmp_path / "x.jsonl"
  path.write_text("{}\n\nnot JSON\n")
  (_, good), (place, bad) = jsonl.rows(path)
  assert good == {} and place.endswith("line 3") and "not JSON" in str(bad)


@pytest.mark.parametrize("indent", [None, 2])
def test_arrays_and_parquet_have_the_same_rows(tmp_path, indent):
  rows = [{"prompt": "p", "n": [1, 2]}, {"prompt": "q", "n": []}]
  array = tmp_path / "a.json"
  array.write_text("\ufeff " + json.dumps(rows, indent=indent))
  assert read(array) == rows
  import pyarrow as pa
  from pyarrow import parquet

  parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "b")
  assert read(tmp_path / "b") == rows


def test_lines_that_are_arrays_are_values_of_lines(tmp_path):
  path = tmp_path / "x.jsonl"
  path.write_text("[1]\n[2]\n")
  assert read(path) == [[1], [2]]
  talk = [{"role": "user", "content": "hi"}]
  path.write_text(f"{json.dumps(talk)}\n\n")  # one row of messages
  assert read(path) == [talk]
  path.write_text(json.dumps([talk, talk]))
  assert read(path) == [talk, talk]


@pytest.mark.parametrize(
  ("body", "message"),
  [
    (b"PK\x03\x04rest", "is a zip archive"),
    (b"\x28\xb5\x2f\xfdrest", "compressed by zstd"),
    (b"BZh9rest", "compressed by bzip2"),
    ("{}\n".encode("utf-16"), "is UTF-16 text"),
    (b"version https://git-lfs.github.com/spec/v1\noid 0\n", "pointer of Git LFS"),
    (gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0), "gzip within gzip"),
    (b"PAR1rest", "no whole parquet file"),
    (gzip.compress(LINE.encode() * 99, mtime=0)[:-20], "rows: .*"),
    (b"\x1f\x8bnothing", "rows: .*"),
  ],
)
def test_what_is_no_file_of_rows_is_named(tmp_path, body, message):
  path = tmp_path / "rows"
  path.write_bytes(body)
  with pytest.raises(DataError, match=message):
    read(path)


def test_a_line_without_end_is_named_and_never_held(tmp_path):
  path = tmp_path / "x.jsonl"
  with path.open("wb") as file:
    file.write(b"{}\n")
    for _ in range(100):
      file.write(b"x" * 2**20)
    file.write(b"\n{}\n")
  tracemalloc.start()
  first, (place, long), last = jsonl.rows(path)
  _, most = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert first[1] == last[1] == {} and place.endswith("line 2")
  assert "104,857,601 bytes" in str(long) and most < 4 * jsonl.MAX_LINE


def test_a_split_may_be_any_kind_of_file(tmp_path, monkeypatch):
  row = {"question": "A has 2. Sum?", "answer": "2\n#### 2"}
  (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
  (tmp_path / "train.json").write_text(
    json.dumps([{"prompt": "p", "chosen": "a", "rejected": "b"}])
  )
  monkeypatch.setenv("HOME", str(tmp_path.parent))
  home = f"~/{tmp_path.name}"
  assert gsm8k.load(home, split="test")[0].answer == "2"
  assert gsm8k.load(f"{home}/test.jsonl.gz")[0].answer == "2"
  assert preferences.load(home)[0].chosen == "a"


@pytest.mark.parametrize("path", ["~nosuchuser/x.jsonl", "/".join(["long"] * 2000)])
@pytest.mark.parametrize("load", [gsm8k.load, preferences.load, prompts.as_examples])
def test_paths_that_cannot_be(path, load):
  with pytest.raises(DataError):
    load(path)

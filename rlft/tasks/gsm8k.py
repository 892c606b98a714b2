"""GSM8K: grade-school word problems, their loading and their answer checks.

A row is {"question": ..., "answer": ...}; the answer is a worked solution with
calculator annotations, `48/2 = <<48/2=24>>24`, and ends in `#### 24`.

Source: Cobbe et al. 2021; github.com/openai/grade-school-math.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlft.core.errors import ConfigError, DataError
from rlft.core.types import Example, Verdict
from rlft.tasks import answers, chains, jsonl

_log = logging.getLogger(__name__)

# The reference's, to the letter.
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
CHECKS = ("numeric", "strict", "flexible")
_ANNOTATION = re.compile(r"<<[^<>]*>>")


def load(
  source: str | os.PathLike | Sequence[str | os.PathLike],
  split: str = "train",
  limit: int | None = None,
  on_bad: str = "raise",
  max_bad_fraction: float = 0.1,
  annotations: str = "keep",
  shots: Sequence[Example] = (),
) -> list[Example]:
  """Problems as examples: prompt "Question: ...\\nAnswer:", solution " ...#### 24".

  Prompt and solution are one text when joined. Rows are checked before anything else
  happens: each needs a question and an answer, both text that is not blank, and the
  answer a final `#### number`.

  Args:
    source: a file (see `jsonl`), several of them, a directory with `<split>.jsonl` or
      another kind of it, or the name of a data set for
      `datasets.load_dataset(name, "main")`, `openai/gsm8k`.
    split: which split of a directory or of a named data set.
    limit: keep the first `limit` good rows and read no further.
    on_bad: "raise" at the first bad row, or "skip" it, count it and log the count.
    max_bad_fraction: with "skip", the share of bad rows above which nothing is loaded.
    annotations: "keep" the `<<48/2=24>>` of solutions, or "strip" them. Without them
      chains are read from plain equations, as far as these can be read.
    shots: examples (loaded without shots) that come first in each prompt, worked.
      Take them from the training split, and not from the rows that are evaluated.

  Returns:
    Examples; `id` is the index of the row in its file (on from the end of the file
    before), so skipped rows shift nothing. `answer` has no commas.

  Raises:
    DataError: no such file, a bad row (file and line are named), too many bad rows, or
      no good row.
    ConfigError: an option that does not exist.
  """
  if on_bad not in ("raise", "skip"):
    raise ConfigError(f"on_bad is {on_bad!r}; it is 'raise' or 'skip'.")
  if annotations not in ("keep", "strip"):
    raise ConfigError(f"annotations is {annotations!r}; it is 'keep' or 'strip'.")
  if limit is not None and limit < 1:
    raise ConfigError(f"limit is {limit}; it is at least 1, or None for all rows.")
  if not 0 <= max_bad_fraction <= 1:
    raise ConfigError(f"max_bad_fraction is {max_bad_fraction}; it is 0 to 1.")
  prefix = "".join(f"{shot.prompt}{shot.solution}\n\n" for shot in shots)
  examples: list[Example] = []
  bad: list[str] = []
  for index, (place, row) in enumerate(_rows(source, split)):
    try:
      examples.append(_example(index, row, prefix, annotations))
    except DataError as error:
      if on_bad == "raise":
        raise DataError(f"{place}: {error}") from None
      bad.append(f"{place}: {error}")
    if len(examples) == limit:
      break
  rows = len(examples) + len(bad)
  if bad:
    _log.warning("skipped %d of %d rows, first %s", len(bad), rows, bad[0])
  if bad and len(bad) > max_bad_fraction * rows:
    raise DataError(
      f"{len(bad)} of {rows} rows are bad, more than max_bad_fraction"
      f"={max_bad_fraction}; first {bad[0]}"
    )
  if not examples:
    raise DataError(f"{_name(source)}: no rows; a row is one JSON object a line.")
  return examples


def judge(completion: str, example: Example, check: str = "numeric") -> Verdict:
  """What a completion is worth.

  - answer: what `check` extracts, normalised.
  - correct: it is the example's answer, as `check` compares.
  - chain: canonical operations, by `chains.canonical`.
  - consistent: every equation holds exactly. The last one need not result in the
    answer, since it does not in 5 % of the reference solutions. None without equations.

  Args:
    completion: what a model wrote after the prompt; graded on its first answer, so a
      model that goes on to invent another question gains nothing.
    example: the problem.
    check: "numeric" reads the number after `####` (`answers.stated`); "flexible" also a
      boxed one, or the last one where there is no `####`, as chat models answer
      (`answers.last`); "strict" is for comparison with published numbers.
  """
  if check not in CHECKS:
    raise ConfigError(f"check is {check!r}; it is one of {CHECKS}.")
  if check == "strict":
    answer = strict_gsm8k(completion)
    correct = answer is not None and answer == example.answer
  else:
    read = answers.stated if check == "numeric" else answers.last
    answer, gold = read(completion), chains.parse_number(example.answer)
    correct = answer is not None and gold is not None
    correct = correct and answer == chains.normalise(gold)
  consistent = chains.consistent(completion)
  return Verdict(answer, correct, consistent, chains.canonical(completion))


def steps(completion: str) -> list[tuple[int, str]]:
  """Where each worked step ends, and its result; see `chains.steps`."""
  return chains.steps(completion)


def strict_gsm8k(text: str) -> str | None:
  """The answer as the reference extracts it, to be compared as a string.

  The first match of `#### (\\-?[0-9\\.\\,]+)`, commas removed: `18.`, `18.0` and `$18`
  are not `18`.

  Returns:
    The answer; None (the reference's "[invalid]") without a match.

  Source: grade_school_math/dataset.py, `extract_answer`.
  """
  match = _STRICT.search(text)
  return match[1].strip().replace(",", "") if match else None


def _example(index: int, row: Any, prefix: str, annotations: str) -> Example:
  """A checked row as an example; DataError says what is wrong with it."""
  if isinstance(row, DataError):
    raise row
  if not isinstance(row, dict):
    raise DataError(f"the row is a {type(row).__name__}; it must be a JSON object.")
  for key in ("question", "answer"):
    if key not in row:
      raise DataError(
        f"no {key!r}; the row has {', '.join(map(str, row)) or 'nothing'}."
      )
    if not isinstance(row[key], str):
      raise DataError(f"{key!r} is {row[key]!r:.40}; it must be text.")
    if not row[key].strip():
      raise DataError(f"{key!r} is blank.")
  solution = row["answer"].strip()
  answer = strict_gsm8k(solution)
  if answer is None or chains.parse_number(answer) is None:
    raise DataError(f"'answer' has no final '#### number'; it ends {solution[-40:]!r}.")
  if annotations == "strip":
    solution = _ANNOTATION.sub("", solution)
  prompt = f"{prefix}Question: {row['question'].strip()}\nAnswer:"
  return Example(index, prompt, " " + solution, answer)


def _name(source: Any) -> str:
  if isinstance(source, (str, os.PathLike)):
    return str(source)
  return ", ".join(map(str, source)) or "no file"


def _rows(source: Any, split: str) -> Iterator[tuple[str, Any]]:
  """(place, row) of each; a row that cannot be read is a DataError that says why."""
  if not isinstance(source, (str, os.PathLike)):
    for path in source:
      yield from jsonl.rows(Path(path))
  elif os.path.isdir(path := Path(os.path.expanduser(source))):
    yield from jsonl.rows(jsonl.of_split(path, split))
  elif os.path.exists(path) or path.name.endswith(jsonl.SUFFIXES):
    yield from jsonl.rows(path)
  elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
    yield from _named_rows(str(source), split)
  else:
    raise DataError(
      f"{source}: no such file; give a jsonl file, a directory with {split}.jsonl, or"
      " the name of a data set, such as 'openai/gsm8k'."
    )


def _named_rows(name: str, split: str) -> Iterator[tuple[str, Any]]:
  import datasets  # seconds to import, and most runs read files

  try:
    rows = datasets.load_dataset(name, "main", split=split)
  except (OSError, ValueError) as error:
    raise DataError(
      f"{name}: `datasets` cannot load split {split!r}: {error}; when offline, give a"
      " jsonl file."
    ) from error
  for number, row in enumerate(rows):
    yield f"{name}[{split}], row {number}", row

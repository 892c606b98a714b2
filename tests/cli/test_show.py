"""Progress in a log and on a terminal, tables that keep their cells, real plots."""

from __future__ import annotations

import io
import subprocess
import sys

import matplotlib.image
import pytest

from rlft.cli import show


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_a_log_gets_plain_lines_at_intervals():
  now, log = [0.0], io.StringIO()
  clock = lambda: now[0]
  with show.progress("eval", 40, stream=log, interval=10, clock=clock) as advance:
    for i in range(40):
      now[0] += 1
      advance(loss=i / 10)
  assert log.getvalue().splitlines() == [
    "eval 10/40 10s loss 0.9",
    "eval 20/40 20s loss 1.9",
    "eval 30/40 30s loss 2.9",
    "eval 40/40 40s loss 3.9",
  ]


def test_a_log_tells_where_it_stopped():
  log = io.StringIO()
  with pytest.raises(KeyError), show.progress("eval", 4, stream=log) as advance:
    advance(3)
    raise KeyError
  assert log.getvalue() == "eval 3/4 0s\n"


def test_a_terminal_gets_a_bar_and_ci_does_not(monkeypatch):
  monkeypatch.delenv("CI", raising=False)
  monkeypatch.setenv("TERM", "xterm")
  for ci in (False, True):
    if ci:
      monkeypatch.setenv("CI", "true")
    screen = Terminal()
    with show.progress("eval", 4, stream=screen) as advance:
      advance(3, loss=0.5)
      advance()
    text = screen.getvalue()
    assert "4/4" in text and "loss 0.5" in text
    assert ("\x1b" in text) is not ci


def test_a_table_in_a_log_keeps_every_cell():
  log = io.StringIO()
  columns = ["arm", *(f"metric number {i}" for i in range(5)), "seconds", "lucky"]
  row = ["expert [b]iteration[/b]", *[(0.41, 0.36, 0.46)] * 5, 1250.4, None]
  show.table("Result", columns, [row], stream=log)
  lines = [line.strip() for line in log.getvalue().splitlines() if line.strip()]
  assert lines[0] == "Result"
  assert lines[1].split("  ")[0] == "arm" and "metric number 4" in lines[1]
  assert lines[-1].startswith("expert [b]iteration[/b]")  # not markup
  assert lines[-1].count("0.410 [0.360, 0.460]") == 5
  assert lines[-1].split()[-2:] == ["1250", "-"]


def test_a_table_in_a_narrow_terminal_cuts_no_interval_off(monkeypatch):
  monkeypatch.setenv("COLUMNS", "80")
  monkeypatch.setenv("TERM", "dumb")
  screen = Terminal()
  columns = ["split", *(f"metric_{i}" for i in range(6))]
  rows = [[name, *[(0.41, 0.36, 0.46)] * 6] for name in ("dev", "test")]
  show.table("Result", columns, rows, stream=screen)
  text = screen.getvalue()
  assert "…" not in text and text.count("0.410 [0.360, 0.460]") == 12
  assert all(text.count(name) == 1 for name in columns[1:])
  assert text.count("dev") == text.count("test") > 1 == text.count("Result")
  assert max(map(len, text.splitlines())) <= 80


ARMS = {"start": (0.2, 0.1, 0.3), "EI": (0.6, 0.5, 0.7)}


def pixels(path, colour: str) -> int:
  """How many pixels of the picture have exactly this colour."""
  image = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)
  rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
  return int((image == rgb).all(-1).sum())


def test_bars_show_every_arm_at_its_height(tmp_path):
  panels = {"id": {"greedy@1": ARMS, "pass@16": ARMS}, "ood": {"greedy@1": ARMS}}
  path = show.plot_bars(tmp_path / "new" / "bars.png", panels, title="EI and SFT")
  low, high = (pixels(path, colour) for colour in show.COLOURS[:2])
  assert 2.5 < high / low < 3.5  # .6 against .2, but for error bars and legend
  assert pixels(path, show.COLOURS[2]) == 0


def test_an_arm_may_be_missing_from_a_group(tmp_path):
  panels = {"id": {"greedy@1": ARMS, "rerank@16": {"EI": (0.6, 0.5, 0.7)}}}
  path = show.plot_bars(tmp_path / "bars.png", panels)
  assert pixels(path, show.COLOURS[1]) > 1.5 * pixels(path, show.COLOURS[0]) > 0


def test_lines_show_every_arm_with_and_without_a_band(tmp_path):
  plain = {"SFT": [(100, 0.5), (0, 0.4)]}
  band = {"SFT": [(100, (0.5, 0.4, 0.6)), (0, (0.4, 0.3, 0.5))]}
  without = show.plot_lines(tmp_path / "a.png", plain | {"EI": [(0, 0.3)]})
  with_ = show.plot_lines(tmp_path / "b.png", band | {"EI": [(0, 0.3)]})
  assert min(pixels(without, colour) for colour in show.COLOURS[:2]) > 50
  white_without, white_with = pixels(without, "#FFFFFF"), pixels(with_, "#FFFFFF")
  assert white_with < 0.9 * white_without


def test_importing_show_is_cheap_and_plots_leave_pyplot_alone(tmp_path):
  code = (
    "import sys; from rlft.cli import show\n"
    "assert not {'matplotlib', 'rich', 'jax'} & set(sys.modules)\n"
    "show.plot_lines(sys.argv[1], {'a': [(0, 1.0)]})\n"
    "assert 'matplotlib.pyplot' not in sys.modules"
  )
  subprocess.run(
    [sys.executable, "-c", code, str(tmp_path / "a.png")], check=True, timeout=60
  )

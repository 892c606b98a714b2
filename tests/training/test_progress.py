"""A person sees a line an iteration; nobody else sees anything."""

from __future__ import annotations

import io

from rlft.training.progress import Progress, listener, step_listener


class Terminal(io.StringIO):
  def isatty(self):
    return True


def feed(show):
  show("sample", {"done": 1, "of": 4})
  show("train", {"step": 1, "of": 2})
  show("iteration", {"reward/mean": 0.25, "completion/truncated": 0.5, "other": 1})
  show("resume", {"iterations": 7})
  show("round", {"accepted": 0.125, "train_loss": 0.5})


def test_lines():
  feed(Progress(9, out := io.StringIO()))
  first, second = out.getvalue().splitlines()
  assert first.startswith("iteration 1/9: reward 0.25, cut 50%, ")
  assert second.startswith("round 8/9: accepted 12%, loss 0.5, ")


def test_a_terminal_sees_what_is_under_way():
  feed(Progress(9, out := Terminal()))
  assert "\r\x1b[Ksample 1/4\r\x1b[Ktrain 1/2\r\x1b[Kiteration 1/9: " in out.getvalue()


def test_a_training_shows_each_tenth():
  show = Progress(out=(out := io.StringIO()))
  for step in range(1, 101):
    show("train", {"step": step, "of": 100, "loss": 1 / step})
  assert len(out.getvalue().splitlines()) == 10
  assert "update 100/100: loss 0.01" in out.getvalue()


def test_who_is_asked(monkeypatch, capsys):
  own = lambda *values: None
  assert listener(own, 1) is own and step_listener(own) is own
  for given in (None, False):  # no terminal here
    feed(listener(given, 1))
    step_listener(given)(1, 1, {"loss": 1.0})
  assert capsys.readouterr() == ("", "")
  monkeypatch.setattr("sys.stderr", terminal := Terminal())
  feed(listener(False, 1))
  assert not terminal.getvalue()
  feed(listener(None, 1))
  step_listener(None)(1, 1, {"loss": 1.0})
  assert "iteration 1/1: " in terminal.getvalue()
  assert "update 1/1: loss 1" in terminal.getvalue()

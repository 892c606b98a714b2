"""What a person sees: progress, tables and plots.

rich and matplotlib are imported where they are used: `import rlft.cli.show` is quick.
Plots are drawn on a canvas of their own, never through pyplot: no display is needed,
and a notebook's backend and open figures stay as they are.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rlft.core import watchdog

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

Interval = tuple[float, float, float]  # estimate, lower bound, upper bound
Advance = Callable[..., None]  # advance(count=1, **numbers to show)

# Distinct in grey print and to colour-blind eyes (Okabe and Ito).
COLOURS = (
  "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#999999",
  "#000000", "#882255", "#F0E442",
)  # fmt: skip
_MARKERS = "osD^vP*X<>"


def _first() -> bool:
  """Whether this process, of several, is the one that people see."""
  if "jax" not in sys.modules:
    return True
  from rlft.core import hosts

  return hosts.first()


@contextlib.contextmanager
def progress(
  title: str,
  total: int,
  *,
  stream: TextIO | None = None,
  interval: float = 10.0,
  clock: Callable[[], float] = time.monotonic,
) -> Iterator[Advance]:
  """Shows progress: a bar on a terminal, else a plain line now and then.

  with progress("evaluate", 100) as advance:
    advance(8, loss=0.5)

  Args:
    title: what is being done.
    total: how many there are to do.
    stream: where it is shown; stderr by default, so that stdout stays for results.
    interval: seconds between plain lines, in a log or in CI; the last one always comes.
    clock: seconds, for those lines.

  Yields:
    `advance(count=1, **numbers)`, to be called as work is done.
  """
  stream = sys.stderr if stream is None else stream
  if not _first():
    stream = io.StringIO()
  interactive = stream.isatty() and "CI" not in os.environ
  with (_bar if interactive else _lines)(title, total, stream, interval, clock) as step:

    def advance(count: int = 1, **numbers: float) -> None:
      watchdog.beat(title)
      step(count, **numbers)

    yield advance


@contextlib.contextmanager
def _bar(
  title: str, total: int, stream: TextIO, interval: float, clock: Callable[[], float]
) -> Iterator[Advance]:
  from rich import console, progress

  columns = (
    progress.TextColumn("{task.description}"),
    progress.BarColumn(),
    progress.MofNCompleteColumn(),
    progress.TimeElapsedColumn(),
    progress.TextColumn("{task.fields[numbers]}"),
  )
  with progress.Progress(*columns, console=console.Console(file=stream)) as bar:
    task = bar.add_task(title, total=total, numbers="")
    yield lambda count=1, **numbers: bar.update(
      task, advance=count, **({"numbers": _spell(numbers)} if numbers else {})
    )


@contextlib.contextmanager
def _lines(
  title: str, total: int, stream: TextIO, interval: float, clock: Callable[[], float]
) -> Iterator[Advance]:
  start = shown = clock()
  done, last = 0, ""

  def show() -> None:
    seconds = clock() - start
    line = f"{title} {done}/{total} {seconds:.0f}s {last}"
    print(line.rstrip(), file=stream, flush=True)

  def advance(count: int = 1, **numbers: float) -> None:
    nonlocal done, last, shown
    done += count
    last = _spell(numbers) if numbers else last
    if clock() - shown >= interval and done < total:
      shown = clock()
      show()

  try:
    yield advance
  finally:
    show()


def _spell(numbers: Mapping[str, float]) -> str:
  return " ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def table(
  title: str,
  columns: Sequence[str],
  rows: Sequence[Sequence[object]],
  *,
  stream: TextIO | None = None,
) -> None:
  """Prints a table: the first column is text, the others are numbers.

  A cell is a number, an `Interval` ("0.41 [0.36, 0.46]"), None or text.
  """
  from rich import box, console, text
  from rich import table as rich_table

  texts = [[cell(value) for value in row] for row in rows]
  stream = sys.stdout if stream is None else stream
  # In a log there is no width to fit: rich would assume 80 and cut cells off.
  out = console.Console(file=stream, width=None if stream.isatty() else 200)
  widths = [
    max(len(name), *(len(row[i]) for row in texts if i < len(row)), 0)
    for i, name in enumerate(columns)
  ]
  for block in _blocks(widths, out.width):
    grid = rich_table.Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for i in block:
      justify = "right" if i else "left"
      grid.add_column(columns[i], justify=justify, no_wrap=True)
    for row in texts:
      # Text, not a str: rich would read "[0.36, 0.46]" as markup.
      grid.add_row(*(text.Text(row[i]) for i in block if i < len(row)))
    out.print(grid)
    title = ""


def _blocks(widths: Sequence[int], room: int) -> list[list[int]]:
  """Columns that stand side by side: a terminal that is too narrow for all shows the
  first one again before those that are left, and cuts no interval off."""
  blocks = [[0]]
  used = edge = 2 + widths[0] + 3
  for i, width in enumerate(widths[1:], 1):
    if used + width + 3 > room and len(blocks[-1]) > 1:
      blocks.append([0])
      used = edge
    blocks[-1].append(i)
    used += width + 3
  return blocks


def cell(value: object) -> str:
  """A value as tables show it."""
  if value is None:
    return "-"
  if isinstance(value, tuple):
    estimate, low, high = value
    return f"{estimate:.3f} [{low:.3f}, {high:.3f}]"
  if isinstance(value, float):
    if 0 < abs(value) < 5e-4:  # a learning rate is not 0.000
      return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
  return str(value)


def plot_bars(
  path: str | os.PathLike[str],
  panels: Mapping[str, Mapping[str, Mapping[str, Interval]]],
  *,
  title: str = "",
  ylabel: str = "accuracy",
) -> Path:
  """Draws grouped bars with their intervals.

  Args:
    path: the PNG file to write.
    panels: panel (a split) -> group (a metric) -> arm (a method) -> interval.
    title: above all panels.
    ylabel: the unit of the values.

  Returns:
    `path`.
  """
  arms = list(dict.fromkeys(a for p in panels.values() for g in p.values() for a in g))
  slots = max(len(groups) for groups in panels.values()) * len(arms)
  width = max(3.2, min(0.45, 12 / slots) * slots + 1.2)
  figure, axes = _figure(len(panels), (width, 4.2))
  for axis, (panel, groups) in zip(axes, panels.items()):
    for i, arm in enumerate(arms):
      for j, intervals in enumerate(groups.values()):
        if arm not in intervals:
          continue
        estimate, low, high = intervals[arm]
        axis.bar(
          j + (i - (len(arms) - 1) / 2) * 0.8 / len(arms),
          estimate,
          0.8 / len(arms),
          yerr=[[max(0.0, estimate - low)], [max(0.0, high - estimate)]],
          color=COLOURS[i % len(COLOURS)],
          edgecolor="white",
          error_kw={"elinewidth": 1, "capsize": 3},
          label=arm,
        )
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set_title(panel, fontsize=10)
    axis.set_ylim(bottom=0)
    axis.set_ylabel(ylabel)
  return _finish(figure, axes, arms, title, path)


def plot_lines(
  path: str | os.PathLike[str],
  series: Mapping[str, Sequence[tuple[float, Any]]],
  *,
  title: str = "",
  xlabel: str = "sampled solutions",
  ylabel: str = "accuracy",
) -> Path:
  """Draws a metric against cost, with a band where a point has an interval.

  Args:
    path: the PNG file to write.
    series: arm -> points (x, y), where y is a number or an `Interval`.
    title: above the plot.
    xlabel: the unit of x.
    ylabel: the unit of y.

  Returns:
    `path`.
  """
  figure, axes = _figure(1, (6.4, 4.2))
  for i, (arm, points) in enumerate(series.items()):
    points = sorted(points, key=lambda point: point[0])
    x = [point[0] for point in points]
    y = [p[1] if isinstance(p[1], tuple) else (p[1],) * 3 for p in points]
    colour = COLOURS[i % len(COLOURS)]
    marker = _MARKERS[i % len(_MARKERS)]
    axes[0].plot(x, [v[0] for v in y], color=colour, marker=marker, label=arm)
    low, high = [v[1] for v in y], [v[2] for v in y]
    if low != high:
      axes[0].fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
  axes[0].set_xlabel(xlabel)
  axes[0].set_ylabel(ylabel)
  return _finish(figure, axes, list(series), title, path)


_WIDEST = 20.0  # inches: a wider row of panels is stacked


def _figure(count: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
  """`count` panels of a size: side by side, or below each other where they are wide."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  rows, columns = (1, count) if count * size[0] <= _WIDEST else (count, 1)
  size = (size[0] * columns, size[1] * rows)
  figure = Figure(figsize=size, layout="constrained")
  FigureCanvasAgg(figure)
  axes = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
  for axis in axes:
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
  return figure, axes


def _finish(
  figure: Figure,
  axes: Sequence[Axes],
  arms: Sequence[str],
  title: str,
  path: str | os.PathLike[str],
) -> Path:
  handles: dict[str, Any] = {}
  for axis in axes:
    for handle, label in zip(*axis.get_legend_handles_labels()):
      handles.setdefault(label, handle)
  figure.legend(
    [handles[arm] for arm in arms if arm in handles],
    [arm for arm in arms if arm in handles],
    loc="outside lower center",
    ncols=min(4, max(1, len(arms))),
    frameon=False,
  )
  if title:
    figure.suptitle(title, fontsize=11)
  path = Path(path)
  if _first():
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
  return path

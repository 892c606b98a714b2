"""What was compiled is kept, loaded to the bit, bounded, and never in the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import pytest

from rlft.core import compiled

SCRIPT = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
import rlft
kept = rlft.keep_compiled()
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
step = jax.jit(lambda w, x: w - .1 * jnp.tanh(x @ w).T @ x.T, donate_argnums=0)
w = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
given, w = jnp.asarray(w), jnp.array(w)
for _ in range(5):
  w = step(w, given)
print(json.dumps({
  "kept": kept and str(kept),
  "hits": hits.count("/jax/compilation_cache/cache_hits"),
  "bits": np.asarray(w).tobytes().hex(),
}))
"""


def start(home, **environ):
  """One process that compiles and steps; what it says, with nothing on stderr."""
  keep = ("JAX_COMPILATION_CACHE_DIR", compiled.VARIABLE)
  env = {k: v for k, v in os.environ.items() if k not in keep}
  env |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")} | environ
  done = subprocess.run(
    [sys.executable, "-W", "always", "-c", SCRIPT],
    env=env, capture_output=True, text=True, timeout=120,
  )  # fmt: skip
  assert (done.returncode, done.stderr) == (0, "")
  return json.loads(done.stdout)


def programs(root):
  return sorted(root.glob("*/*.program"))


def test_the_second_start_loads_what_the_first_compiled_to_the_bit(tmp_path):
  root = tmp_path / "cache" / "rlft" / "compiled"
  first, second = start(tmp_path), start(tmp_path)
  assert first["kept"] == second["kept"] == str(root)
  assert (first["hits"], second["hits"]) == (0, len(programs(root)))
  assert second["hits"] >= 2
  assert first["bits"] == second["bits"]
  assert root.stat().st_mode & 0o077 == 0, "code is loaded from here"
  # A disk that lost the end of a write, and one that turned a bit.
  torn, turned = programs(root)[:2]
  torn.write_bytes(torn.read_bytes()[:-7])
  data = bytearray(turned.read_bytes())
  data[len(data) // 2] ^= 4
  turned.write_bytes(data)
  third = start(tmp_path)
  assert (third["bits"], third["hits"]) == (first["bits"], second["hits"] - 2)
  kept = compiled._Store(root, torn.parent, 10**9)
  assert kept.get(torn.stem) and kept.get(turned.stem), "written again, whole"


def test_the_user_says_where_and_whether(tmp_path, monkeypatch):
  def asked(**environ):
    home = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    return compiled.keep_compiled(environ=home | environ)

  from jax._src import compilation_cache

  monkeypatch.setattr(compilation_cache, "get_file_cache", lambda path: None)
  updated = {}
  monkeypatch.setattr(jax.config, "update", updated.__setitem__)
  assert asked(RLFT_COMPILATION_CACHE="off") is None
  assert not updated and not (tmp_path / "cache").exists()
  there = tmp_path / "there"
  assert asked(RLFT_COMPILATION_CACHE=str(there)) == there
  assert updated == {
    "jax_compilation_cache_dir": str(there),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
  }
  updated.clear()
  own = asked(JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="2")
  assert own == tmp_path / "cache" / "rlft" / "compiled"
  assert updated == {"jax_compilation_cache_dir": str(own)}


@pytest.mark.parametrize("place", ["file", "other"])
def test_no_place_to_keep_is_no_reason_to_speak(tmp_path, monkeypatch, place):
  (tmp_path / "cache").mkdir()
  if place == "file":
    (tmp_path / "cache" / "rlft").write_text("in the way")
  else:  # where others write, code is not loaded from
    (tmp_path / "cache" / "rlft" / "compiled").mkdir(parents=True)
    (tmp_path / "cache" / "rlft" / "compiled").chmod(0o777)
  environ = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
  assert compiled.keep_compiled(environ=environ) is None
  assert jax.config.jax_compilation_cache_dir is None
  monkeypatch.setenv("HOME", "nowhere")  # a container without a user
  assert compiled.keep_compiled(environ={}) is None


def store(root, most=1000):
  return compiled._Store(root, root / "kind", most)


def test_a_store_is_bounded_and_forgets_what_was_not_used(tmp_path):
  kept = store(tmp_path)
  old = tmp_path / "0.9.0_cpu"
  old.mkdir()
  (old / "x.program").write_bytes(bytes(900))
  (old / "killed.part").write_bytes(bytes(50))
  (old / "notes.txt").write_bytes(bytes(5000))  # not ours
  for name in (old / "x.program", old / "killed.part"):
    os.utime(name, (1, 1))
  for i in range(4):
    kept.put(f"k{i}", bytes([i]) * 200)
    os.utime(tmp_path / "kind" / f"k{i}.program", (10 + i, 10 + i))
  assert sorted(p.name for p in old.iterdir()) == ["notes.txt"]
  assert kept.get("k0") == bytes(200)  # used just now
  kept.put("k4", bytes([4]) * 200)
  assert [kept.get(f"k{i}") is not None for i in range(5)] == [1, 0, 1, 1, 1]
  assert sum(p.stat().st_size for p in programs(tmp_path)) <= 1000
  kept.put("large", bytes(1001))
  assert kept.get("large") is None
  assert len(programs(tmp_path)) == 4


def test_a_disk_that_fails_is_a_miss(tmp_path, monkeypatch):
  kept = store(tmp_path)
  (tmp_path / "kind").write_text("no directory")
  kept.put("k", b"program")
  assert kept.get("k") is None
  (tmp_path / "kind").unlink()

  def full(self, data):
    with self.open("wb") as file:
      file.write(data[:3])
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr("pathlib.Path.write_bytes", full)
    kept.put("k", b"program")
  assert kept.get("k") is None
  assert not list((tmp_path / "kind").iterdir())
  kept.put("k", b"program")
  assert kept.get("k") == b"program"


WRITER = """
import sys, pathlib
from rlft.core import compiled
root = pathlib.Path(sys.argv[1])
kept = compiled._Store(root, root / "kind", 200_000)
print("ready", flush=True)
while True:
  for i in range(20):
    value = kept.get(f"k{i}")
    assert value in (None, bytes([i]) * 20_000), i
    kept.put(f"k{i}", bytes([i]) * 20_000)
"""


def test_processes_write_at_once_and_are_killed(tmp_path):
  started = [
    subprocess.Popen(
      [sys.executable, "-c", WRITER, str(tmp_path)],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    for _ in range(3)
  ]  # fmt: skip
  for process in started:
    assert process.stdout.readline() == b"ready\n"
  for process in started:
    with pytest.raises(subprocess.TimeoutExpired):  # it fails only by its own assert
      process.wait(0.3)
    process.kill()
    assert process.communicate()[1] == b""
  kept = store(tmp_path, 200_000)
  values = [kept.get(f"k{i}") for i in range(20)]
  assert any(values)
  assert all(v in (None, bytes([i]) * 20_000) for i, v in enumerate(values))
  kept.put("k0", bytes(20_000))
  assert sum(p.stat().st_size for p in tmp_path.glob("*/*")) <= 200_000


def test_a_machine_loads_nothing_of_another(monkeypatch):
  mine = compiled._kind()
  assert jax.__version__ in mine and "/" not in mine and mine == compiled._kind()
  monkeypatch.setattr(compiled, "_FACTS", ("flags",))
  other = compiled._kind()
  monkeypatch.setattr(compiled, "_threads", lambda: 999)
  assert len({mine, other, compiled._kind()}) == 3

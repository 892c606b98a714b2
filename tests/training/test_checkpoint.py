"""A checkpoint is complete and verified, or it is not used; faults are real ones."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from rlft.core.errors import CheckpointError, ConfigError
from rlft.core.mesh import make_mesh
from rlft.training.checkpoint import DIRECTORY, LOCK, Checkpointer
from rlft.training.optimizer import OptimizerConfig
from rlft.training.step import init_state

# Orbax leaves coroutines and threads of a failed read or write to the collector, which
# has them say so at some later time.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module", autouse=True)
def litter():
  """What these tests have thrown away is gone before another module's tests."""
  yield
  gc.collect()


def tree(seed: int = 0, rows: int = 128):
  """A few arrays whose bytes do not compress away."""
  a, b = jax.random.split(jax.random.key(seed))
  return {
    "policy": {
      "kernel": jax.random.normal(a, (rows, 16)),
      "bias": jax.random.normal(b, (16,)).astype(jnp.bfloat16),
    },
    "step": jnp.int32(seed),
  }


def names(x):
  return {jax.tree_util.keystr(p): v for p, v in jax.tree_util.tree_leaves_with_path(x)}


def same(one, other):
  """Equal structure, types and bits: NaN is itself, and -0 is not 0."""
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for name, x in names(one).items():
    y = names(other)[name]
    assert (x.shape, x.dtype) == (y.shape, y.dtype), name
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      assert jax.random.key_impl(x) == jax.random.key_impl(y)
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), name


def path_of(workdir, step):
  return workdir / DIRECTORY / f"{step:08d}"


def saved(workdir, *steps, **settings):
  """A work directory with these checkpoints in it."""
  with Checkpointer(workdir, **{"keep_last": 9} | settings) as checkpointer:
    for step in steps:
      assert checkpointer.save(step, tree(step), {"cursor": step})
  return workdir


def data_files(path):
  """The files that hold arrays' values, largest first."""
  files = (path / "arrays").rglob("d/*")
  return sorted(files, key=lambda file: -file.stat().st_size)


def flip(path, offset, bit=0):
  data = bytearray(path.read_bytes())
  data[offset] ^= 1 << bit
  path.write_bytes(data)


# --------------------------------------------------------------------- round trips


def test_every_kind_of_array_comes_back_bit_by_bit(tmp_path):
  odd = np.array([np.nan, -np.nan, -0.0, np.inf, 1e-45], np.float32)
  state = {
    "f32": jnp.asarray(odd),
    "bf16": jnp.asarray(odd).astype(jnp.bfloat16),
    "f16": jnp.float16(0.1),
    "f8": jnp.ones((3,), jnp.float8_e4m3fn),
    "i4": jnp.arange(-3, 3).astype(jnp.int4),
    "i8": jnp.int8(-3),
    "u32": jnp.uint32([1, 2**31, 2**32 - 1]),
    "bool": jnp.array([True, False]),
    "scalar": jnp.int32(7),
    "none at all": None,
    "empty": jnp.zeros((0, 3)),
    "key": jax.random.key(3),
    "keys": jax.random.split(jax.random.key(3, impl="rbg"), 4),
    "numpy": np.arange(5, dtype=np.int64),
    "double": np.float64([0.1]),
    "empty numpy": np.zeros((2, 0), np.int16),
  }
  state = {name.replace(" ", "_"): x for name, x in state.items()}
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(0, state)
    like = jax.tree.map(lambda x: x, state)
    found = checkpointer.restore(like)
    same(found.arrays, state)
    for name, x in found.arrays.items():
      assert isinstance(x, type(state[name])) or x is None, name
    flat = checkpointer.restore().arrays  # as numpy arrays, by name
    assert all(isinstance(x, np.ndarray) or "key" in name for name, x in flat.items())
    same(flat, {name: x for name, x in state.items() if x is not None})


def lora_state():
  params = {
    "lora": {
      "layers": {"q": {"a": jnp.ones((2, 4, 3)), "b": jnp.zeros((2, 3, 4))}},
      "out": {"a": jnp.ones((4, 3)), "b": jnp.zeros((3, 4))},
    },
    "head": {"kernel": jnp.zeros((4,)), "bias": jnp.zeros(())},
  }
  config = OptimizerConfig(weight_decay=0.1, freeze=(r"lora/out",))
  return init_state(params, config, 10)


def masked_state():
  params = {"a": jnp.ones(3), "b": jnp.ones(2)}
  optimizer = optax.chain(
    optax.masked(optax.adam(1e-3), {"a": True, "b": False}), optax.trace(0.9)
  )
  return {"params": params, "opt": optimizer.init(params)}


@pytest.mark.parametrize("make", [lora_state, masked_state, dict, lambda: ((), [])])
def test_states_keep_their_structure(tmp_path, make):
  state = make()
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(3, state, {"kl_coef": 0.1})
    found = checkpointer.restore(state)
  same(found.arrays, state)
  assert (found.step, found.meta) == (3, {"kl_coef": 0.1})


def test_meta_is_a_copy_and_exact(tmp_path):
  meta = {"seed": 2**63, "kl": 0.1 + 0.2, "rows": [[1, "ä"]], "dev": float("nan")}
  with Checkpointer(tmp_path, config={"learning_rate": 1e-4}) as checkpointer:
    checkpointer.save(1, tree(), meta, {"dev": np.float32(0.5)})
    meta["rows"].append("later")  # while the save runs
    found = checkpointer.restore(tree())
  assert np.isnan(found.meta.pop("dev"))
  assert found.meta == {"seed": 2**63, "kl": 0.1 + 0.2, "rows": [[1, "ä"]]}
  assert found.config == {"learning_rate": 1e-4} and found.metrics == {"dev": 0.5}
  assert type(found.metrics["dev"]) is float


def test_what_is_donated_after_save_was_saved_before(tmp_path):
  update = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
  state = jnp.arange(1 << 20, dtype=jnp.float32)
  with Checkpointer(tmp_path, keep_last=9) as checkpointer:
    for step in range(4):
      expected = np.array(state, copy=True)
      checkpointer.save(step, {"x": state})
      for _ in range(5):
        state = update(state)
      found = checkpointer.restore(step=step).arrays["x"]
      assert np.array_equal(found, expected)


@pytest.mark.parametrize(
  ("arrays", "message"),
  [
    ({"kl_coef": 0.1}, "'kl_coef' is no array of numbers: put it into `meta`"),
    ({"a": np.array(["x"])}, "'a' is no array"),
    ({"a": np.array([None])}, "'a' is no array"),
    ({"..": np.ones(1)}, "'..'"),
    ({"a/b": np.ones(1), "a": {"b": np.ones(1)}}, "'a/b': .* each once"),
  ],
)
def test_what_cannot_be_saved_is_named(tmp_path, arrays, message):
  with Checkpointer(tmp_path) as checkpointer:
    with pytest.raises(CheckpointError, match=message):
      checkpointer.save(0, arrays)
    with pytest.raises(CheckpointError, match=r"meta cannot be .* set is no number"):
      checkpointer.save(0, tree(), {"seen": {1}})
    assert checkpointer.steps() == []


# ------------------------------------------------------------------------- meshes


def test_another_mesh_gets_the_same_values(tmp_path):
  devices = jax.devices()
  wide = make_mesh(1, 4, 2, devices=devices[:8])
  square = make_mesh(1, 2, 2, devices=devices[:4])
  put = lambda mesh, *spec: NamedSharding(mesh, PartitionSpec(*spec))
  kernel = np.arange(128, dtype=np.float32).reshape(8, 16)
  keys = jax.random.split(jax.random.key(0), 8)
  state = {
    "kernel": jax.device_put(kernel, put(wide, "fsdp", "tensor")),
    "keys": jax.device_put(keys, put(wide, "fsdp")),
    "whole": jax.device_put(np.float32(3), put(wide)),
  }
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(0, state)
    checkpointer.wait()
    digests = {k: e["sha256"] for k, e in checkpointer.manifest(0)["arrays"].items()}
    one = SingleDeviceSharding(devices[3])
    for home in (put(square, "tensor"), put(wide), one):
      small = put(home.mesh) if isinstance(home, NamedSharding) else one
      homes = {"kernel": home, "keys": home, "whole": small}
      like = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=homes[name])
        for name, x in state.items()
      }
      found = checkpointer.restore(like).arrays
      same(found, state)
      for name, x in found.items():
        same_home = x.sharding == homes[name]  # in spelling too, or steps recompile
        if name == "keys":  # jax itself spells P() of keys P(None)
          same_home = x.sharding.is_equivalent_to(homes[name], x.ndim)
        assert same_home, name
      step = checkpointer.steps()[-1] + 1
      checkpointer.save(step, found)  # a digest is of the values, however they lie
      checkpointer.wait()
      again = {k: e["sha256"] for k, e in checkpointer.manifest(step)["arrays"].items()}
      assert again == digests


# ------------------------------------------------------------------------- damage


def flip_data(path):
  largest = data_files(path)[0]
  flip(largest, largest.stat().st_size // 2)


def truncate(path):
  largest = data_files(path)[0]
  os.truncate(largest, largest.stat().st_size // 2)


def empty(path):
  shutil.rmtree(path)
  path.mkdir()


def edit(path):
  """What a person might do by hand."""
  file = path / "manifest" / "manifest.json"
  file.write_text(file.read_text().replace('"cursor": 2', '"cursor": 3'))


def swap(path):
  """One whole checkpoint under another one's name."""
  shutil.rmtree(path)
  shutil.copytree(path.with_name("00000001"), path)


FAULTS = {
  "flip": (flip_data, "policy/kernel: sha256 is [0-9a-f]{64}, not [0-9a-f]{64}"),
  "truncate": (truncate, "policy/kernel: cannot be read"),
  "delete": (lambda path: data_files(path)[0].unlink(), "policy/kernel: cannot be"),
  "no arrays": (lambda path: shutil.rmtree(path / "arrays"), "policy/kernel: cannot"),
  "no manifest": (
    lambda path: (path / "manifest" / "manifest.json").unlink(),
    "manifest.json: is missing",
  ),
  "half a manifest": (
    lambda path: os.truncate(path / "manifest" / "manifest.json", 99),
    "manifest.json: cannot be read",
  ),
  "edited": (edit, "manifest.json: sha256 is"),
  "empty": (empty, "manifest.json: is missing"),
  "swapped": (swap, "manifest.json: is of step 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_named_and_the_one_before_is_used(tmp_path, caplog, fault):
  damage, message = FAULTS[fault]
  saved(tmp_path, 1, 2)
  damage(path_of(tmp_path, 2))
  with Checkpointer(tmp_path) as checkpointer:
    assert checkpointer.verify(1) == {} and checkpointer.verify(2)
    for arguments in ({"strict": True}, {"step": 2}):
      with pytest.raises(CheckpointError, match=message) as raised:
        checkpointer.restore(tree(), **arguments)
      assert "00000002 is damaged" in str(raised.value)
      assert r"before it: [1]" in str(raised.value)
    caplog.clear()
    found = checkpointer.restore(tree())
    assert found.step == 1 and found.meta == {"cursor": 1}
    same(found.arrays, tree(1))
    (record,) = [r for r in caplog.records if r.name.startswith("rlft")]
    assert record.levelname == "ERROR" and "THE ONE BEFORE" in record.getMessage()
    # The run goes on from there, over the step that was damaged.
    assert checkpointer.steps() == [1]
    assert path_of(tmp_path, 2).with_suffix(".damaged").is_dir()
    assert checkpointer.save(2, tree(2))
    same(checkpointer.restore(tree(), strict=True).arrays, tree(2))


def test_when_all_are_damaged_nothing_starts_anew_by_itself(tmp_path):
  saved(tmp_path, 1, 2)
  flip_data(path_of(tmp_path, 1))
  flip_data(path_of(tmp_path, 2))
  none = pytest.raises(CheckpointError, match=r"00000001 is damaged.*before it: none")
  with Checkpointer(tmp_path) as checkpointer, none:
    checkpointer.restore(tree())


def test_what_cannot_be_restored_for_another_reason_is_not_damage(
  tmp_path, monkeypatch
):
  saved(tmp_path, 1, 2)
  with Checkpointer(tmp_path) as checkpointer:
    import orbax.checkpoint as ocp

    restore = ocp.PyTreeCheckpointHandler.restore

    def no_memory(self, directory, *, args):
      if len(args.item) > 1:  # the whole tree is too much, one array is not
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
      return restore(self, directory, args=args)

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", no_memory)
    with pytest.raises(CheckpointError, match="though it can read each array: Runtime"):
      checkpointer.restore(tree())
    monkeypatch.undo()
    assert checkpointer.steps() == [1, 2]
    assert checkpointer.restore(tree()).step == 2


def flips(path, like, offsets):
  """Flips a bit at offsets of every file: (seen, harmless); fails on a wrong value."""
  seen = harmless = 0
  step = int(path.name)
  with Checkpointer(path.parents[1], lock=False) as checkpointer:
    expected = checkpointer.restore(like, step=step)
    for file in sorted(f for f in path.rglob("*") if f.is_file()):
      original = file.read_bytes()
      for offset in offsets(len(original)):
        flip(file, offset, bit=offset % 8)
        try:
          found = checkpointer.restore(like, step=step)
        except CheckpointError as error:
          assert "damaged" in str(error) or "no step" in str(error), error
          seen += 1
        else:
          same(found.arrays, expected.arrays)
          assert found.meta == expected.meta
          harmless += 1
        file.write_bytes(original)
  return seen, harmless


def test_a_flipped_bit_in_any_file_is_seen_or_changes_nothing(tmp_path):
  saved(tmp_path, 1)
  middle = lambda size: [size // 2] if size else []
  seen, _ = flips(path_of(tmp_path, 1), tree(), middle)
  assert seen >= 3  # of the arrays' data, of the index, and of the manifest


@pytest.mark.slow
def test_flipped_bits_all_over_are_seen_or_change_nothing(tmp_path):
  saved(tmp_path, 1)
  many = lambda size: range(0, size, max(1, size // 40))
  seen, harmless = flips(path_of(tmp_path, 1), tree(), many)
  print(f"{seen} of {seen + harmless} flips seen, {harmless} harmless")
  assert seen > 100


# ------------------------------------------------------------- whose checkpoint it is


def change(state, **leaves):
  return state | {"policy": state["policy"] | leaves}


@pytest.mark.parametrize(
  ("like", "message"),
  [
    (
      change(tree(), kernel=jnp.zeros((128, 17))),
      r"policy/kernel: float32\[128,16\] there, float32\[128,17\] here",
    ),
    (change(tree(), bias=jnp.zeros(16)), r"bfloat16\[16\] there, float32\[16\] here"),
    (change(tree(), more=jnp.zeros(2)), r"policy/more: absent there, float32\[2\]"),
    ({"policy": tree()["policy"]}, r"step: int32\[\] there, absent here"),
  ],
)
def test_another_models_checkpoint_is_refused(tmp_path, like, message):
  saved(tmp_path, 1, 2)
  with Checkpointer(tmp_path) as checkpointer:
    with pytest.raises(CheckpointError, match=message):
      checkpointer.restore(like)
    assert checkpointer.steps() == [1, 2]  # nothing is put aside: they are whole


def test_another_runs_checkpoint_is_refused(tmp_path):
  saved(tmp_path, 1, identity={"algorithm": "ppo", "model": "a"}, config={"lr": 1})
  other = {"algorithm": "grpo", "model": "a"}
  with Checkpointer(tmp_path, identity=other) as checkpointer:
    with pytest.raises(CheckpointError, match="algorithm: 'ppo', here 'grpo'; choose"):
      checkpointer.restore(tree())
    assert checkpointer.manifest(1)["config"] == {"lr": 1}
  same_run = {"algorithm": "ppo", "model": "a"}
  with Checkpointer(tmp_path, identity=same_run, config={"lr": 2}) as checkpointer:
    assert checkpointer.restore(tree()).config == {"lr": 1}


def test_nothing_to_resume_from(tmp_path):
  with Checkpointer(tmp_path / "new") as checkpointer:
    assert checkpointer.restore(tree()) is None and checkpointer.best() is None
    with pytest.raises(CheckpointError, match=r"no step 3; there are \[\]"):
      checkpointer.restore(tree(), step=3)


# ---------------------------------------------------------------------- retention


@pytest.mark.parametrize(
  ("settings", "expected", "later"),
  [
    ({"keep_last": 1}, [6], [7]),
    ({"keep_last": 2, "keep_every": 3}, [3, 5, 6], [3, 6, 7]),
    ({"keep_last": 1, "keep_best": ("dev", "max")}, [2, 6], [2, 7]),
    (
      {"keep_last": 1, "keep_best": ("loss", "min"), "keep_every": 5},
      [4, 5, 6],
      [5, 7],
    ),
    ({"keep_last": 2, "keep_best": ("unknown", "max")}, [5, 6], [6, 7]),
  ],
)
def test_retention_keeps_exactly_this(tmp_path, settings, expected, later):
  dev = {1: np.nan, 2: 0.9, 3: 0.5, 4: 0.9, 5: 0.1, 6: 0.2}
  loss = {1: 3.0, 2: 2.0, 3: 2.0, 4: 1.0, 6: 5.0}
  best = {"dev": [2, 2], "loss": [4, 7]}
  one = {"x": np.ones(1)}
  with Checkpointer(tmp_path, **settings) as checkpointer:
    for step in dev:
      metrics = {"dev": dev[step]} | ({"loss": loss[step]} if step in loss else {})
      checkpointer.save(step, one, metrics=metrics)
    checkpointer.wait()
    assert checkpointer.steps() == expected
    name = settings.get("keep_best", ("none",))[0]
    assert checkpointer.best() == best.get(name, [None])[0]
  with Checkpointer(tmp_path, **settings) as checkpointer:  # reads what it knows
    checkpointer.save(7, one, metrics={"dev": 0.3, "loss": 0.5})
    checkpointer.wait()
    assert checkpointer.steps() == later
    assert checkpointer.best() == best.get(name, [None])[-1]


def test_what_failed_or_cannot_be_read_does_not_count(tmp_path):
  with Checkpointer(tmp_path, keep_last=1) as checkpointer:
    checkpointer.save(1, tree(1))
    checkpointer.wait()
    with file_limit(2000):
      checkpointer.save(2, tree(2))
      with pytest.raises(CheckpointError):
        checkpointer.wait()
    assert checkpointer.steps() == [1]
  saved(tmp_path, 2)
  (path_of(tmp_path, 2) / "manifest" / "manifest.json").unlink()
  with Checkpointer(tmp_path, keep_last=2) as checkpointer:
    checkpointer.save(3, tree(3))
    checkpointer.wait()
    assert checkpointer.steps() == [1, 2, 3]


def test_a_step_is_saved_once(tmp_path):
  with Checkpointer(tmp_path) as checkpointer:
    assert checkpointer.save(1, tree(1)) and not checkpointer.save(1, tree(2))
    same(checkpointer.restore(tree()).arrays, tree(1))
  with Checkpointer(tmp_path) as checkpointer:
    with pytest.raises(
      CheckpointError, match=r"00000001 would not be the newest, .* \[1\]"
    ):
      checkpointer.save(1, tree(2))
    checkpointer.restore(tree())  # from here on it is this run's
    assert not checkpointer.save(1, tree(2))


def test_an_older_step_is_not_gone_on_from_beside_newer_ones(tmp_path):
  saved(tmp_path, 1, 2, 3)
  with Checkpointer(tmp_path, keep_last=2) as checkpointer:
    assert checkpointer.restore(tree(), step=1).step == 1
    # Retention would take it for an old one, and remove it.
    with pytest.raises(CheckpointError, match=r"00000002 would .* \[2, 3\]: remove"):
      checkpointer.save(2, tree(9))
    assert checkpointer.steps() == [1, 2, 3]


# -------------------------------------------------------------- disks and directories


@contextlib.contextmanager
def file_limit(size):
  """No file of this process can grow beyond so many bytes: a write really fails."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_one_write_that_fails_stops_no_run_and_two_do(tmp_path, caplog):
  big = tree(rows=512)
  with Checkpointer(tmp_path, max_failures=2) as checkpointer:
    checkpointer.save(1, big)
    checkpointer.wait()
    with file_limit(2000):
      checkpointer.save(2, big)
      assert checkpointer.save(3, big)  # goes on, and tries again
      assert "00000002 could not be written" in caplog.text
      assert "File too large" in caplog.text and "are free: make room" in caplog.text
      assert "the next save tries again" in caplog.text
      with pytest.raises(CheckpointError, match=r"00000003 could not .* make room"):
        checkpointer.save(4, big)
    with pytest.raises(CheckpointError, match="00000003 could not"):
      checkpointer.wait()  # the last one has failed; it says so once
    checkpointer.wait()
    assert checkpointer.steps() == [1]
    same(checkpointer.restore(big).arrays, big)
    assert checkpointer.save(5, big)  # there is room again
    checkpointer.wait()
    assert checkpointer.steps() == [1, 5]
    names = {p.name for p in (tmp_path / DIRECTORY).iterdir()}
    assert names == {"00000001", "00000005"}


@contextlib.contextmanager
def without_rights():
  """As a user who owns nothing here; root may write everywhere."""
  root = os.geteuid() == 0
  if root:
    os.seteuid(65534)
  try:
    yield
  finally:
    if root:
      os.seteuid(0)


@pytest.fixture
def public():
  """A directory that others may enter; none of those above pytest's own is."""
  with tempfile.TemporaryDirectory() as path:
    os.chmod(path, 0o755)
    yield Path(path)


@pytest.mark.parametrize("inner", [False, True], ids=["workdir", "checkpoints"])
def test_a_read_only_directory_fails_before_the_first_step(public, inner):
  workdir = public / "run"
  saved(workdir, 1)
  (workdir / LOCK).chmod(0o666)
  workdir.chmod(0o777 if inner else 0o555)
  (workdir / DIRECTORY).chmod(0o555 if inner else 0o777)
  if not inner:
    (workdir / LOCK).unlink()
  with without_rights():
    with pytest.raises(CheckpointError, match=r"run cannot be written \(.*Permission"):
      Checkpointer(workdir)
    with Checkpointer(workdir, lock=False) as checkpointer:  # to look is allowed
      same(checkpointer.restore(tree()).arrays, tree(1))
      with pytest.raises(CheckpointError, match="only to be read"):
        checkpointer.save(2, tree())
  with Checkpointer(workdir):
    pass  # the failure has left no lock


def test_what_killed_saves_left_is_removed(tmp_path):
  saved(tmp_path, 1)
  root = tmp_path / DIRECTORY
  for name in ("00000002.orbax-checkpoint-tmp", "00000001.orbax-checkpoint-tmp-17"):
    shutil.copytree(path_of(tmp_path, 1), root / name)
  shutil.copytree(path_of(tmp_path, 1), root / "00000000.deleting")
  with Checkpointer(tmp_path, lock=False) as checkpointer:
    assert checkpointer.steps() == [1] and len(list(root.iterdir())) == 4
  with Checkpointer(tmp_path) as checkpointer:
    assert checkpointer.steps() == [1] and len(list(root.iterdir())) == 1


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"keep_last": 0}, "keep_last=0, max_failures=3: at least 1"),
    ({"keep_every": -1}, "keep_every=-1"),
    ({"max_failures": 0}, "max_failures=0"),
    ({"keep_best": ("dev", "biggest")}, "'max' or 'min'"),
  ],
)
def test_settings_that_cannot_be(tmp_path, settings, message):
  with pytest.raises(ConfigError, match=message):
    Checkpointer(tmp_path, **settings)
  with pytest.raises(ConfigError, match="mount the bucket"):
    Checkpointer("gs://bucket/run")


# ---------------------------------------------------------------------- processes

CHILD = os.environ | {
  "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])
}

# Saves a chain of states; each is a function of its step. A line is printed once a
# save has been started.
SAVER = """
import sys, jax
jax.config.update("jax_platforms", "cpu")
from rlft.training.checkpoint import Checkpointer
from test_checkpoint import chain
with Checkpointer(sys.argv[1], keep_last=2) as checkpointer:
  found = checkpointer.restore(chain(0))
  first = 0 if found is None else found.step
  print("ready", first, flush=True)
  for step in range(first + 1, int(sys.argv[2])):
    checkpointer.save(step, chain(step), {"cursor": step})
    if step % 2:
      checkpointer.wait()
    print("step", step, flush=True)
"""


def chain(step):
  """A state that is a function of its step: 1 MB in three arrays."""
  rng = np.random.default_rng(step)
  big = rng.integers(0, 2**32, (2, 1 << 17), dtype=np.uint32)
  return {"a": big[0], "b": big[1].view(np.float32), "step": np.int32([step])}


def saver(workdir, steps=10**6):
  return subprocess.Popen(
    [sys.executable, "-c", SAVER, str(workdir), str(steps)],
    env=CHILD,
    stdout=subprocess.PIPE,
    text=True,
  )


def kill_and_look(workdir, kills, seed):
  """SIGKILLs savers at random moments; what they leave is whole. Steps, leftovers."""
  rng, last, left = np.random.default_rng(seed), 0, 0
  for _ in range(kills):
    process = saver(workdir)
    assert process.stdout.readline() == f"ready {last}\n"
    for _ in range(rng.integers(0, 4)):
      process.stdout.readline()
    time.sleep(rng.uniform(0, 0.08))
    process.kill()
    printed = [int(line.split()[1]) for line in process.stdout.read().splitlines()]
    assert process.wait() == -signal.SIGKILL
    left += any("tmp" in p.name for p in (workdir / DIRECTORY).iterdir())
    with Checkpointer(workdir, lock=False) as checkpointer:
      found = checkpointer.restore(chain(0), strict=True)
      if found is not None:
        same(found.arrays, chain(found.step))
        assert found.meta == {"cursor": found.step} and found.step >= last
        last = found.step
      # A save is waited for by the next one: at most one was lost.
      assert last >= max(printed, default=0) - 1
  return last, left


def test_kill_9_while_saving_leaves_the_last_whole_checkpoint(tmp_path):
  last, _ = kill_and_look(tmp_path, 1, seed=3)
  with Checkpointer(tmp_path) as checkpointer:  # the dead owner's lock is free
    checkpointer.restore(chain(0), strict=True)
    checkpointer.save(last + 1, chain(last + 1))
    same(checkpointer.restore(chain(0), strict=True).arrays, chain(last + 1))
  assert all(p.name.isdigit() for p in (tmp_path / DIRECTORY).iterdir())


@pytest.mark.slow
def test_kill_9_thirty_times_at_random_moments(tmp_path):
  last, left = kill_and_look(tmp_path, 30, seed=1)
  print(f"at step {last}; {left} of 30 kills were inside a save")
  assert last > 5 and left > 5


HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
file.write("pid of a child")
file.flush()
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(60)
"""


def test_two_writers_are_refused_and_a_dead_one_is_not_waited_for(tmp_path):
  first = Checkpointer(tmp_path)
  with pytest.raises(CheckpointError, match=rf"\(pid {os.getpid()} on .* since 20"):
    Checkpointer(tmp_path)
  first.close()
  first.close()  # twice is once
  process = subprocess.Popen(
    [sys.executable, "-c", HOLDER, str(tmp_path / LOCK)], stdout=subprocess.PIPE
  )
  process.stdout.readline()
  with pytest.raises(CheckpointError, match=r"another run .* \(pid of a child\)"):
    Checkpointer(tmp_path)
  Checkpointer(tmp_path, lock=False).close()
  process.kill()
  process.communicate()
  Checkpointer(tmp_path).close()
  text = (tmp_path / LOCK).read_text()
  assert text.startswith(f"pid {os.getpid()} on ") and text.count("\n") == 1


def test_an_error_of_the_run_is_not_hidden_by_one_of_a_save(tmp_path, caplog):
  run_error = pytest.raises(KeyError, match="of the run")
  with run_error, file_limit(2000), Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, tree())
    raise KeyError("of the run")
  assert "00000001 could not be written" in caplog.text
  Checkpointer(tmp_path).close()  # and it has let go
  save_error = pytest.raises(CheckpointError, match="00000001 could not")
  with save_error, file_limit(2000), Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, tree())


# A disk of 3 MB that fills up, in a mount namespace of its own.
FULL = """
import sys, os, logging
import jax
jax.config.update("jax_platforms", "cpu")
from rlft.core.errors import CheckpointError
from rlft.training.checkpoint import Checkpointer
from test_checkpoint import chain, same
workdir = sys.argv[1]
with Checkpointer(workdir, max_failures=2) as checkpointer:
  checkpointer.save(1, chain(1))
  checkpointer.wait()
  filler = open(os.path.join(workdir, "filler"), "wb")
  filler.write(bytes(1_400_000)); filler.flush()
  checkpointer.save(2, chain(2))
  try:
    checkpointer.wait()
  except CheckpointError as error:
    print("ERROR", error, flush=True)
  same(checkpointer.restore(chain(0), strict=True).arrays, chain(1))
  filler.truncate(0); filler.close()
  checkpointer.save(3, chain(3))
  checkpointer.wait()
  same(checkpointer.restore(chain(0), strict=True).arrays, chain(3))
  print("STEPS", checkpointer.steps(), flush=True)
"""


@pytest.mark.slow
def test_a_full_disk(tmp_path):
  probe = f"mount -t tmpfs -o size=3m tmpfs {tmp_path}"
  unshare = ["unshare", "--user", "--map-root-user", "--mount"]
  if os.geteuid() == 0:
    unshare = ["unshare", "--mount"]
  can = shutil.which("unshare") and not subprocess.call([*unshare, "sh", "-c", probe])
  if not can:
    pytest.skip("no mount namespaces here: a full disk cannot be made")
  done = subprocess.run(
    [*unshare, "sh", "-c", f'{probe} && exec "$@"', "sh", sys.executable, "-c", FULL,
     str(tmp_path)],
    env=CHILD,
    capture_output=True,
    text=True,
    timeout=120,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  assert "00000002 could not be written" in done.stdout
  assert "No space left on device" in done.stdout
  assert "make room" in done.stdout and "bytes" in done.stdout
  assert done.stdout.endswith("STEPS [1, 3]\n")


HOSTS = """
import sys, jax, numpy as np
port, workdir = sys.argv[1:3]
rank, first, blind = map(int, sys.argv[3:])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
from jax.sharding import NamedSharding, PartitionSpec as P
from rlft.core.errors import CheckpointError
from rlft.core.mesh import make_mesh
from rlft.training.checkpoint import Checkpointer
if blind and rank == 1:
  import orbax.checkpoint as ocp
  read = ocp.PyTreeCheckpointHandler.restore
  def restore(self, directory, *, args):
    if f"{blind:08d}" in str(directory):
      raise ValueError("this process cannot read it")
    return read(self, directory, args=args)
  ocp.PyTreeCheckpointHandler.restore = restore
mesh = make_mesh(2, 2, 1)
values = np.arange(64, dtype=np.float32).reshape(8, 8)
put = lambda x, *spec: jax.make_array_from_callback(
  x.shape, NamedSharding(mesh, P(*spec)), lambda index: x[index])
state = lambda step: {
  "rows": put(values + step, "data"), "columns": put(values - step, None, "fsdp"),
  "both": put(values * step, "fsdp", "data"), "whole": put(np.float32(step))}
with Checkpointer(workdir, keep_last=3, identity={"run": "a"}) as checkpointer:
  found = checkpointer.restore(state(0))
  print("FOUND", None if found is None else found.step, flush=True)
  if found is not None:
    for name, x in state(found.step).items():
      shards = found.arrays[name].addressable_shards
      for mine, theirs in zip(shards, x.addressable_shards, strict=True):
        assert np.array_equal(mine.data, theirs.data), name
  for step in (first, first + 1):
    checkpointer.save(step, state(step), {"cursor": step}, {"dev": step})
  checkpointer.wait()
  print("STEPS", checkpointer.steps(), flush=True)
try:
  Checkpointer(workdir, keep_last=3, identity={"run": "b"}).restore(state(0))
except CheckpointError as error:
  print("REFUSED", "run: 'a', here 'b'" in str(error), flush=True)
"""


def hosts(workdir, first, blind=0):
  """Two processes with two devices each, on one mesh; what each of them printed."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = str(probe.getsockname()[1])
  env = {k: v for k, v in CHILD.items() if k != "XLA_FLAGS"}
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", HOSTS, port, str(workdir), str(rank), str(first),
       str(blind)],
      env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    for rank in range(2)
  ]  # fmt: skip
  try:
    outs = [process.communicate(timeout=90) for process in processes]
  finally:
    for process in processes:
      process.kill()
  for process, (_, errors) in zip(processes, outs):
    assert process.returncode == 0, errors[-3000:]
  said = [
    [line for line in out.splitlines() if not line.startswith("[Gloo]")]
    for out, _ in outs
  ]
  return said, [errors for _, errors in outs]


@pytest.mark.slow
def test_two_processes_save_and_restore_one_checkpoint(tmp_path, caplog):
  said, _ = hosts(tmp_path, 1)
  assert said[0] == said[1] == ["FOUND None", "STEPS [1, 2]", "REFUSED True"]
  with Checkpointer(tmp_path, lock=False) as checkpointer:  # here, on one device
    entries = checkpointer.manifest(2)["arrays"]
    assert set(entries["rows"]["sha256"]) == {"0:4,0:8", "4:8,0:8"}
    assert len(entries["both"]["sha256"]) == 4 and len(entries["whole"]["sha256"]) == 1
    assert checkpointer.verify(2) == {}
    values = np.arange(64, dtype=np.float32).reshape(8, 8)
    assert np.array_equal(checkpointer.restore().arrays["both"], values * 2)
  assert "could not be verified" not in caplog.text
  manifest = path_of(tmp_path, 2) / "manifest" / "manifest.json"
  manifest.write_text(manifest.read_text().replace('"cursor": 2', '"cursor": 3'))
  said, errors = hosts(tmp_path, 3)
  assert said[0] == said[1] == ["FOUND 1", "STEPS [1, 3, 4]", "REFUSED True"]
  assert all("THE ONE BEFORE" in error for error in errors)
  for file in data_files(path_of(tmp_path, 4)):
    flip(file, file.stat().st_size // 2)
  said, errors = hosts(tmp_path, 5)
  assert said[0] == said[1] == ["FOUND 3", "STEPS [3, 5, 6]", "REFUSED True"]
  # What one process alone cannot read must not leave the other waiting for it.
  said, errors = hosts(tmp_path, 7, blind=6)
  assert said[0] == said[1] == ["FOUND 5", "STEPS [5, 7, 8]", "REFUSED True"]

"""Saving, resuming and stopping: Orbax behind one door.

`Checkpoints` keeps the last few states with what is needed to go on from them, `guard` keeps two
runs out of one directory, `Preemption` turns SIGTERM into a flag the training loop reads.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

_ITEMS = ("state", "meta")  # the two parts of every finished step
_SHOWN = 8  # differences an error names before it only counts them


class Checkpoints:
  """The saved steps of one run; a context manager that waits for the last save on leaving.

  A step is written beside its final place and renamed when whole, so a process that dies while
  saving leaves the steps before it intact; what it left over goes when the run is opened again.
  """

  def __init__(
    self, directory: epath.PathLike, *, every: int | None = None, keep: int | None = None
  ):
    """Opens the directory, and makes it if need be.

    Args:
      directory: where the steps lie; with several processes, storage that all of them reach.
      every: steps between two saves. Without `every` and `keep` the directory is opened to read
        only, which is safe while another process trains in it.
      keep: how many of the latest steps stay.

    Raises:
      ValueError: `every` or `keep` below 1, or only one of them.
      FileNotFoundError: nothing to read there.
    """
    read_only = every is None and keep is None
    if not read_only and (every is None or keep is None or min(every, keep) < 1):
      raise ValueError(f"every and keep must be at least 1, found every={every}, keep={keep}")
    self.directory = epath.Path(directory).expanduser().absolute()
    self._every = every
    if read_only and not self.directory.is_dir():
      raise FileNotFoundError(f"{self.directory} does not exist, so there is nothing to restore")
    if not read_only:
      _remove_unfinished(self.directory)
    options = ocp.CheckpointManagerOptions(
      save_interval_steps=0 if read_only else every,
      preservation_policy=checkpoint_managers.LatestN(keep),
      create=not read_only,
      cleanup_tmp_directories=not read_only,
      read_only=read_only,
    )
    self._manager = ocp.CheckpointManager(
      self.directory, options=options, handler_registry=_handlers()
    )

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, *exception) -> None:
    self.close()

  def latest(self) -> int | None:
    """The newest finished step, or None; waits for a save in flight."""
    self.wait()
    self._manager.reload()
    return max(filter(self._finished, self._manager.all_steps()), default=None)

  def save(self, step: int, state: Any, *, meta: dict[str, Any], force: bool = False) -> bool:
    """Starts saving and returns once the arrays are copied; the disk is written in the background.

    Every process calls it with the same arguments. A failure shows at the next call of any method.

    Args:
      step: updates done; a step that is there already stays as it is.
      state: any tree of arrays; keys as raw key data.
      meta: all else a resumed run needs, as JSON: position in the data, resolved config,
        `versions.code_version()`.
      force: save though `step` is no multiple of `every`.

    Returns:
      Whether a save was started.

    Raises:
      TypeError: meta is not JSON.
      OSError: this step or the one before it could not be written.
    """
    if self._every is None:
      raise ValueError(f"{self.directory} was opened to read; pass every= and keep= to save")
    if step in self._manager.all_steps() or not (force or step % self._every == 0):
      return False
    json.dumps(meta)  # fails here rather than in the background
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    with _writing():
      return self._manager.save(step, args=args, force=True)

  def restore(self, abstract_state: Any, *, step: int | None = None) -> tuple[Any, dict[str, Any]]:
    """Reads a step onto any mesh, to the bit.

    Args:
      abstract_state: the tree that was saved, of `jax.ShapeDtypeStruct`s with the shardings wanted.
      step: which; the newest without it.

    Returns:
      (state, meta) as given to `save`.

    Raises:
      FileNotFoundError: no such step.
      ValueError: names the leaves of the checkpoint that are missing, new or of another shape or
        dtype, or the leaves without a sharding; or the step's files are damaged.
    """
    step = self._existing(step)
    expected = _leaves(abstract_state)
    bare = [path for path, leaf in expected.items() if leaf.sharding is None]
    if bare:
      raise ValueError(
        f"restoring needs a sharding for every leaf, found none for {_some(bare)}. Pass "
        "jax.ShapeDtypeStruct(shape, dtype, sharding=...)."
      )
    with self._reading(step):
      found = _leaves(self._manager.metadata(step).item_metadata["state"].tree)
    different = _leaf_differences(found, expected)
    if different:
      raise ValueError(
        f"step {step} in {self.directory} holds another state than the one to restore; "
        f"{len(different)} of {len(found | expected)} leaves differ:\n  {_some(different)}\n"
        "Build the model and optimizer of the saved config, or start in another --workdir."
      )
    args = ocp.args.Composite(
      state=ocp.args.StandardRestore(abstract_state), meta=ocp.args.JsonRestore()
    )
    with self._reading(step):
      restored = self._manager.restore(step, args=args)
    return restored.state, restored.meta

  def read(self, *fields: str, step: int | None = None) -> dict[str, Any]:
    """Some fields of a saved state, say 'params', as numpy trees: no template, no devices.

    Raises:
      FileNotFoundError: no such step.
    """
    step = self._existing(step)
    saved = self._manager.metadata(step).item_metadata["state"].tree
    wanted = {field: saved[field] for field in fields}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    args = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      return reader.restore(self.directory / str(step) / _ITEMS[0], args=args)

  def meta(self, step: int | None = None) -> dict[str, Any]:
    """The `meta` of a step (the newest without `step`), reading no array."""
    args = ocp.args.Composite(meta=ocp.args.JsonRestore())
    step = self._existing(step)
    with self._reading(step):
      return self._manager.restore(step, args=args).meta

  def wait(self) -> None:
    """Blocks until the save in flight is finished; raises its error if it failed."""
    with _writing():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, then frees the threads. The object is of no use afterwards."""
    with _writing():
      self._manager.close()

  @contextlib.contextmanager
  def _reading(self, step: int) -> Iterator[None]:
    """Says which step is damaged and how to go on without it."""
    try:
      yield
    except Exception as error:  # a cut or missing array file raises just that in Orbax
      steps = sorted(self._manager.all_steps())
      cause = " ".join(str(error).split())[:200]
      raise ValueError(
        f"step {step} can't be read ({cause}). Mend its files, or remove "
        f"{self.directory / str(step)} to go on from the step before it; there are {steps}."
      ) from error

  def _finished(self, step: int) -> bool:
    return _is_finished(self.directory / str(step))

  def _existing(self, step: int | None) -> int:
    latest = self.latest()
    if latest is None:
      raise FileNotFoundError(f"{self.directory} holds no finished checkpoint")
    if step is not None and not self._finished(step):
      steps = sorted(filter(self._finished, self._manager.all_steps()))
      raise FileNotFoundError(f"{self.directory} holds no step {step}, only {steps}")
    return latest if step is None else step


@contextlib.contextmanager
def _writing() -> Iterator[None]:
  """TensorStore calls whatever storage answers a ValueError."""
  try:
    yield
  except ValueError as error:
    raise OSError(f"a checkpoint can't be written: {error}") from error


def _handlers() -> ocp.handlers.DefaultCheckpointHandlerRegistry:
  """Says what each item is before anything was saved, so that metadata can be read at once."""
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  state, meta = ocp.StandardCheckpointHandler(), ocp.JsonCheckpointHandler()
  for args in (ocp.args.StandardSave, ocp.args.StandardRestore):
    registry.add("state", args, state)
  for args in (ocp.args.JsonSave, ocp.args.JsonRestore):
    registry.add("meta", args, meta)
  return registry


def finished_steps(directory: epath.PathLike) -> list[int]:
  """The steps that a run's directory holds whole, from its files alone."""
  path = epath.Path(directory)
  entries = path.iterdir() if path.is_dir() else ()
  return [int(entry.name) for entry in entries if entry.name.isdigit() and _is_finished(entry)]


def _is_finished(path: epath.Path) -> bool:
  return all((path / item).exists() for item in _ITEMS)


def _remove_unfinished(directory: epath.Path) -> None:
  """Removes steps that lost a part, say to a kill in mid-deletion: Orbax would count them."""
  if jax.process_index() != 0 or not directory.exists():
    return  # the manager's constructor is the barrier the other processes wait at
  for path in directory.iterdir():
    if path.name.isdigit() and not _is_finished(path):
      path.rmtree()


def _leaves(tree: Any) -> dict[str, Any]:
  """{'params/encoder/kernel': leaf}; fields, keys and indices read alike, as Orbax stores them."""
  flat = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def _leaf_differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
  def describe(leaves, path):
    if path not in leaves:
      return "nothing"
    return f"{leaves[path].dtype}{list(leaves[path].shape)}"

  # Parameters first: what differs in the optimizer and the target only echoes them.
  paths = sorted({*found, *expected}, key=lambda path: (not path.startswith("params"), path))
  pairs = [(p, describe(found, p), describe(expected, p)) for p in paths]
  return [f"{p}: saved {old}, expected {new}" for p, old, new in pairs if old != new]


def _some(lines: list[str]) -> str:
  more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
  return "\n  ".join(lines[:_SHOWN] + more)


def diff(
  saved: Mapping[str, Any],
  now: Mapping[str, Any],
  *,
  ignore: tuple[str, ...] = (),
  defaults: Mapping[str, Any] | None = None,
) -> list[str]:
  """Where two nested configs differ, as JSON sees them (a tuple equals a list).

  Args:
    saved: the older config.
    now: the newer one.
    ignore: dotted keys to leave out; a key stands for all below it.
    defaults: what the older one says where it lacks a key of the newer.

  Returns:
    Lines such as 'optim.lr: saved 0.001, now 0.002', sorted by key.
  """
  old, new = _flatten(saved), _flatten(now)
  old = {key: value for key, value in _flatten(defaults or {}).items() if key in new} | old
  prefixes = tuple(f"{key}." for key in ignore)
  keys = [k for k in sorted({*old, *new}) if not f"{k}.".startswith(prefixes)]

  def show(config, key):
    return repr(config[key]) if key in config else "absent"

  return [
    f"{key}: saved {show(old, key)}, now {show(new, key)}"
    for key in keys
    if key not in old or key not in new or old[key] != new[key]
  ]


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
  def walk(value, prefix):
    if isinstance(value, dict) and value:
      for key, below in value.items():
        yield from walk(below, (*prefix, key))
    else:
      yield ".".join(prefix), value

  return dict(walk(json.loads(json.dumps(config)), ()))


def check_workdir(
  workdir: epath.PathLike,
  config: Mapping[str, Any],
  *,
  ignore: tuple[str, ...] = (),
  defaults: Mapping[str, Any] | None = None,
) -> None:
  """Raises where `guard` would refuse the directory; writes nothing. Arguments as there."""
  path = epath.Path(workdir).expanduser()
  target = path / "config.json"
  if target.exists():
    different = diff(_read_config(target), config, ignore=ignore, defaults=defaults)
    if different:
      raise ValueError(
        f"{path} holds a run with another config:\n  {_some(different)}\n"
        "Start this one in another --workdir, or go on with the config in config.json."
      )
  elif path.exists() and any(entry.name != _temporary(target).name for entry in path.iterdir()):
    raise ValueError(
      f"{path} is not empty and holds no jepax run (no config.json). Give an empty or a new "
      "directory as --workdir."
    )


def guard(
  workdir: epath.PathLike,
  config: Mapping[str, Any],
  *,
  ignore: tuple[str, ...] = (),
  defaults: Mapping[str, Any] | None = None,
) -> None:
  """Claims a directory for one run by writing config.json, or refuses; for process 0 alone.

  Args:
    workdir: absent, empty, or holding the same run.
    config: the resolved config, JSON-able.
    ignore: dotted keys that may change within a run, such as its length.
    defaults: of keys that the run of an older jepax lacks, which stood for just that.

  Raises:
    ValueError: another run lies there (names the keys that differ), or files of no run at all.
    OSError: it is a file, or can't be written.
  """
  check_workdir(workdir, config, ignore=ignore, defaults=defaults)
  path = epath.Path(workdir).expanduser()
  target = path / "config.json"
  temporary = _temporary(target)
  path.mkdir(parents=True, exist_ok=True)
  temporary.write_text(json.dumps(config, indent=2) + "\n")
  temporary.replace(target)


def _temporary(target: epath.Path) -> epath.Path:
  return target.with_name(f".{target.name}.tmp")


def _read_config(path: epath.Path) -> dict[str, Any]:
  try:
    config = json.loads(path.read_text())
  except json.JSONDecodeError:
    config = None
  if not isinstance(config, dict):
    raise ValueError(
      f"{path} is not the config of a jepax run. Give an empty or a new directory as --workdir."
    )
  return config


class Preemption:
  """Turns the first SIGTERM or SIGINT into a flag, so that the loop can save and leave.

  A second signal acts as if this class were not there: it interrupts or ends the process. With
  several processes JAX's own service hears SIGTERM and makes all stop at the same step.
  """

  def __init__(self):
    self.requested = False
    self._handlers = {}

  def __enter__(self) -> Preemption:
    # A handler of ours would silence JAX's; and Python allows handlers in the main thread only.
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._handlers[number] = signal.signal(number, self._receive)
    return self

  def __exit__(self, *exception) -> None:
    self._restore_handlers()

  def reached(self, step: int) -> bool:
    """Whether to stop after this step; the same answer on every process.

    Args:
      step: updates done. Every process asks at every step.
    """
    if jax.process_count() > 1:
      self.requested |= multihost_utils.reached_preemption_sync_point(step)
    return self.requested

  def _receive(self, number, frame) -> None:
    self.requested = True
    self._restore_handlers()

  def _restore_handlers(self) -> None:
    while self._handlers:
      signal.signal(*self._handlers.popitem())

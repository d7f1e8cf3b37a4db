"""Notices at once when one of several processes is gone.

JAX notices by heartbeats that fail to come, up to a minute later, and ends in a stack trace of its
runtime. A socket closes with the process that holds it, so here every process holds one to the
first. Hosts that fall silent without closing anything are left to the heartbeats.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

_NUMBER = struct.Struct("!i")  # a message: the process that was lost, or
_LEAVES = -1  # the sender leaves in peace
_TIMEOUT = 30  # seconds to connect; without a connection there are still the heartbeats


@contextlib.contextmanager
def watch(lost: Callable[[int], None]) -> Iterator[None]:
  """While in the block, reports other processes that end or leave it by an exception.

  Args:
    lost: called with the process's number, in a thread, at most once.
  """
  if jax.process_count() == 1:
    yield
    return
  first = jax.process_index() == 0
  connections = _accept() if first else _connect()
  end = threading.Event()  # from here on what closes is no loss
  target = _watch_others if first else _watch_first
  threading.Thread(target=target, args=(connections, lost, end), daemon=True).start()
  try:
    yield
    end.set()
    for connection in connections.values():
      _send(connection, _LEAVES)
  finally:
    for connection in connections.values():
      with contextlib.suppress(OSError):  # it is closed
        connection.shutdown(socket.SHUT_RDWR)


def _accept() -> dict[int, socket.socket]:
  """Process 0's connections to the others, by their numbers."""
  found: dict[int, socket.socket] = {}
  with socket.create_server(("", 0)) as server:
    server.settimeout(_TIMEOUT)
    address = [*map(int, _own_address().split(".")), server.getsockname()[1]]
    multihost_utils.broadcast_one_to_all(np.array(address, np.int32))
    try:
      while len(found) < jax.process_count() - 1:
        connection, _ = server.accept()
        connection.settimeout(_TIMEOUT)
        number = _receive(connection)
        connection.settimeout(None)
        if number is not None:
          found[number] = connection
    except TimeoutError:
      logging.warning("%d processes did not connect", jax.process_count() - 1 - len(found))
  return found


def _connect() -> dict[int, socket.socket]:
  """Another's connection to process 0."""
  *parts, port = multihost_utils.broadcast_one_to_all(np.zeros(5, np.int32)).tolist()
  address = (".".join(map(str, parts)), port)
  try:
    connection = socket.create_connection(address, timeout=_TIMEOUT)
  except OSError as error:
    logging.warning("No connection to process 0 at %s:%d: %s", *address, error)
    return {}
  connection.settimeout(None)
  _send(connection, jax.process_index())
  return {0: connection}


def _own_address() -> str:
  """An IPv4 address of this host that others can reach, if it has one."""
  with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    try:
      probe.connect(("192.0.2.1", 9))  # picks a network interface; nothing is sent
      return probe.getsockname()[0]
    except OSError:  # no network
      return "127.0.0.1"


def _watch_others(connections, lost, end) -> None:
  """On process 0: waits for a connection to close, tells the other processes, then `lost`."""
  open_ = {connection: number for number, connection in connections.items()}
  while open_ and not end.is_set():
    for connection in select.select(list(open_), [], [])[0]:
      number, message = open_.pop(connection), _receive(connection)
      if message == _LEAVES or end.is_set():
        continue
      for other in open_:
        _send(other, number)
      lost(number)
      return


def _watch_first(connections, lost, end) -> None:
  """Elsewhere: waits for process 0 to name a lost process, to leave, or to be lost itself."""
  for connection in connections.values():
    message = _receive(connection)
    if message != _LEAVES and not end.is_set():
      lost(0 if message is None else message)


def _send(connection: socket.socket, number: int) -> None:
  with contextlib.suppress(OSError):  # the receiver is gone, which its own connection tells
    connection.sendall(_NUMBER.pack(number))


def _receive(connection: socket.socket) -> int | None:
  """The next message; None where the other side is gone."""
  with contextlib.suppress(OSError):
    data = connection.recv(_NUMBER.size, socket.MSG_WAITALL)
    return _NUMBER.unpack(data)[0] if len(data) == _NUMBER.size else None
  return None

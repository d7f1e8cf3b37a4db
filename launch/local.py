"""Runs one command as several processes of this machine, which find each other: as on a cluster.

  python launch/local.py --processes=2 --devices=4 -- python -m jepax.main --config=FILE

Each line that a process prints gets its number in front. SIGTERM and Ctrl-C reach all of them as
SIGTERM, upon which jepax saves and ends; a second one kills. When a process fails, the others get
--grace seconds to end by themselves. Exits with the code of the first that failed (128 + n for
signal n), else with 0. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

POLL = 0.1  # seconds between two looks at the processes


def main(argv: Sequence[str] | None = None) -> int:
  """Starts the processes and waits for all of them."""
  options = parse(argv)
  signals = note_signals()
  processes = start(options)
  printers = [
    threading.Thread(target=forward, args=(source, sink, index), daemon=True)
    for index, process in enumerate(processes)
    for source, sink in ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
  ]
  for printer in printers:
    printer.start()
  try:
    code = wait(processes, signals, grace=options.grace)
  finally:
    send(processes, signal.SIGKILL)
  for printer in printers:
    printer.join(timeout=5)
  return code


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """The options; ends the program on a wrong one."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
  )
  parser.add_argument("--processes", type=int, default=2, metavar="N")
  parser.add_argument(
    "--devices", type=int, default=0, metavar="N",
    help="simulated CPU devices a process; by default those that the machine has",
  )  # fmt: skip
  parser.add_argument("--port", type=int, default=0, help="of process 0; a free one by default")
  parser.add_argument(
    "--grace", type=float, default=30.0, metavar="SECONDS",
    help="for the other processes to end once one has failed",
  )  # fmt: skip
  parser.add_argument("command", nargs=argparse.REMAINDER, help="after --: what to run")
  options = parser.parse_args(argv)
  if options.command[:1] == ["--"]:
    del options.command[0]
  if not options.command:
    parser.error("give the command after --: -- python -m jepax.main --config=FILE")
  if not shutil.which(options.command[0]):
    parser.error(f"there is no program {options.command[0]!r} to run")
  if options.processes < 1 or options.devices < 0 or not options.grace >= 0:
    parser.error("--processes must be at least 1, --devices and --grace not negative")
  return options


def start(options: argparse.Namespace) -> list[subprocess.Popen]:
  """The processes, each leading a group of its own, so that a Ctrl-C reaches only this program."""
  environment = os.environ | {
    "JAX_COORDINATOR_ADDRESS": f"localhost:{options.port or free_port()}",
    "JAX_NUM_PROCESSES": str(options.processes),
    "PYTHONUNBUFFERED": "1",
  }
  if options.devices:
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(options.devices)}
  return [
    subprocess.Popen(
      options.command,
      env=environment | {"JAX_PROCESS_ID": str(index)},
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      start_new_session=True,
    )
    for index in range(options.processes)
  ]


def free_port() -> int:
  """A port nobody listens at; that may change, but hardly within the moment it takes."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def forward(source: IO[bytes], sink: IO[str], index: int) -> None:
  """Prints a process's lines, each behind its number and in one piece."""
  for line in source:
    sink.write(f"[{index}] {line.decode(errors='replace').rstrip()}\n")
    sink.flush()


def note_signals() -> list[signal.Signals]:
  """A list that grows with what SIGTERM and SIGINT ask for, from now on.

  First SIGTERM, which a run answers by saving, then SIGKILL.
  """
  noted: list[signal.Signals] = []

  def receive(number, frame) -> None:
    noted.append(signal.SIGKILL if noted else signal.SIGTERM)

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, receive)
  return noted


def send(processes: Sequence[subprocess.Popen], number: signal.Signals) -> None:
  """Sends a signal to the processes that still run; SIGKILL reaches what they started, too."""
  for process in processes:
    if process.poll() is None:
      os.killpg(process.pid, number) if number == signal.SIGKILL else process.send_signal(number)


def wait(
  processes: Sequence[subprocess.Popen], signals: Sequence[signal.Signals], *, grace: float
) -> int:
  """Waits for all; once one failed, `grace` seconds at most, then kills. Returns the exit code.

  Passes on what `signals` come to hold.
  """
  code, deadline, sent = 0, float("inf"), 0
  while True:
    for number in signals[sent:]:
      send(processes, number)
      sent += 1
    codes = [process.poll() for process in processes]
    failed = [i for i, ended in enumerate(codes) if ended]
    if failed and not code:
      ended = codes[failed[0]]
      code, deadline = exit_code(ended), time.monotonic() + grace
      how = f"was ended by {signal.Signals(-ended).name}" if ended < 0 else f"failed with {ended}"
      tell(f"process {failed[0]} of {len(codes)} {how}; the others have {grace:g} s to end")
    left = [str(i) for i, ended in enumerate(codes) if ended is None]
    if not left:
      return code
    if time.monotonic() > deadline:
      tell(f"still running, and killed: {', '.join(left)}")
      return code
    time.sleep(POLL)


def exit_code(returncode: int) -> int:
  """As shells have it: 128 + n for signal n."""
  return returncode if returncode >= 0 else 128 - returncode


def tell(text: str) -> None:
  """A line of the launcher's own."""
  print(f"[launch] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
  sys.exit(main())

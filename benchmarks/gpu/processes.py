"""Processes as /proc shows them: a process' descendants, what they compute and what memory they hold. Ends none."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ ")
_OBJECT_STORE = "/plasma"  # of the name of the file that Ray's object store is mapped from


@dataclass(frozen=True)
class Process:
    """`started` tells it from a later process of the same number."""

    pid: int
    parent: int
    started: int  # clock ticks since the machine's start
    cpu_s: float
    title: str  # its command line, or what it calls itself

    @classmethod
    def read(cls, pid: int) -> "Process | None":
        """None if there is none, or it has ended and waits for its parent."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
            title = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return None
        fields = stat.rpartition(")")[2].split()  # the name before may hold anything
        if fields[0] == "Z":
            return None
        cpu_s = (int(fields[11]) + int(fields[12])) * _TICK_S
        text = title.replace(b"\0", b" ").decode(errors="replace").strip()
        return cls(pid, int(fields[1]), int(fields[19]), cpu_s, text)

    def is_alive(self) -> bool:
        now = Process.read(self.pid)
        return now is not None and now.started == self.started


def family(root: int) -> list[Process]:
    """A process and all its descendants."""
    processes = [p for entry in os.listdir("/proc") if entry.isdigit() and (p := Process.read(int(entry)))]
    pids = {root}
    while True:
        members = [p for p in processes if p.pid in pids or p.parent in pids]
        if len(members) == len(pids & {p.pid for p in processes}):
            return members
        pids |= {p.pid for p in members}


def role(process: Process) -> str:
    """A short name of what a process does for a Ray Serve application."""
    if found := re.match(r"ray::ServeReplica:[^:]*:(\w+)", process.title):
        return found[1]
    if found := re.match(r"ray::(\w+)", process.title):
        return found[1]
    for name in ("raylet", "gcs_server", "valkey-server"):
        if name in process.title.partition(" ")[0]:
            return name
    return "other"


def cores_used(before: Iterable[Process], after: Iterable[Process], seconds: float) -> dict[str, float]:
    """Processor cores that each role was busy on, those below 1 % left out."""
    spent: dict[str, float] = defaultdict(float)
    earlier = {(p.pid, p.started): p.cpu_s for p in before}
    for process in after:
        spent[role(process)] += process.cpu_s - earlier.get((process.pid, process.started), 0.0)
    busiest = sorted(spent.items(), key=lambda item: -item[1])
    return {name: round(cpu_s / seconds, 2) for name, cpu_s in busiest if cpu_s / seconds > 0.01}


@dataclass
class Memory:
    """Bytes. A page that n processes have mapped counts 1/n in a proportional (pss) figure of each."""

    rss: int = 0
    pss: int = 0
    anonymous: int = 0  # the process' own, shared with nobody: heap, stacks
    store_rss: int = 0  # of the object store's segment
    store_pss: int = 0

    @classmethod
    def read_own(cls) -> "Memory":
        return cls.read(os.getpid())

    @classmethod
    def read(cls, pid: int) -> "Memory":
        """Zeros for a process that has ended."""
        memory = cls()
        try:
            lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
        except OSError:
            return memory
        in_store = False
        for line in lines:
            if _MAPPING.match(line):
                in_store = _OBJECT_STORE in line
                continue
            name, _, rest = line.partition(":")
            if name not in ("Rss", "Pss", "Anonymous"):
                continue
            num_bytes = int(rest.split()[0]) << 10
            memory.rss += num_bytes * (name == "Rss")
            memory.pss += num_bytes * (name == "Pss")
            memory.anonymous += num_bytes * (name == "Anonymous")
            memory.store_rss += num_bytes * (name == "Rss" and in_store)
            memory.store_pss += num_bytes * (name == "Pss" and in_store)
        return memory


def shared_memory_bytes() -> int:
    """All of the machine's, files in /dev/shm included."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Shmem:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/meminfo has no Shmem")

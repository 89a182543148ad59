"""Files that a killed process left."""

import platform
import zlib
from pathlib import Path

GONE = 999_999_999  # no system counts its processes so far


def half_written(path: Path, process: int = GONE, machine: str = platform.node()) -> Path:
    """The temporary path at which a process of a machine was writing `path`."""
    return path.with_name(f".{path.name}.{zlib.crc32(machine.encode()):08x}-{process}-0123abcd.new")

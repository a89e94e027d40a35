"""The hidden folder beside a plan in which a search writes its trials.

.NAME-search-????????/
    lock            held while the search runs; a killed process lets go of it
    trial.gguf      and other files of the search
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from edge_moe.file_lock import lock, lock_if_possible

_LOCK, _UNLOCKED = "lock", "lock.new"
_RANDOM = "[a-z0-9_]{8}"
"""What `TemporaryDirectory` puts behind a prefix."""


@contextmanager
def search_folder(output: Path) -> Iterator[Path]:
    """Yield a new folder beside `output`, which is removed when the block ends.

    Folders that killed searches left there are removed first; those of living ones are not.
    """
    parent, prefix = output.absolute().parent, f".{output.stem}-search-"
    parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(parent, prefix)
    with TemporaryDirectory(prefix=prefix, dir=parent) as name:
        folder = Path(name)
        with (folder / _UNLOCKED).open("w") as handle:
            lock_if_possible(handle)
            (folder / _UNLOCKED).rename(folder / _LOCK)  # nobody ever finds it unlocked
            yield folder


def _remove_abandoned(parent: Path, prefix: str) -> None:
    pattern = re.compile(re.escape(prefix) + _RANDOM)
    for folder in parent.iterdir():
        is_ours = pattern.fullmatch(folder.name) and not folder.is_symlink()
        if not is_ours or not (folder / _LOCK).is_file():
            continue
        try:
            with (folder / _LOCK).open("w") as handle:
                if lock(handle):  # without locks nobody knows whether the search lives
                    shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue  # a living search's, another user's, or removed by its owner just now

"""Splits of tar shards that other programs made, by the names of folders and files."""

from __future__ import annotations

import re

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def split_of_names(tar_shard: str, key: str) -> str | None:
    """Return the split "train", "val" or "test" that names say, None if they say none.

    The innermost folder of the tar shard that names one split decides, else its file name
    (`photos-train-000.tar`), else the innermost folder of the key (`val/cat/1`). A name such as
    `train_test` says nothing.

    Args:
        tar_shard: Path relative to the data set.
        key: Key of the sample.
    """
    *folders, file = tar_shard.split("/")
    for name in (*reversed(folders), file.rpartition(".")[0]):
        words = re.findall("[a-z]+", name.lower())
        found = {_SPLITS[word] for word in words if word in _SPLITS}
        if len(found) == 1:
            return found.pop()
    parts = key.lower().split("/")[:-1]
    return next((_SPLITS[part] for part in reversed(parts) if part in _SPLITS), None)

"""Whether a manifest, the index of a shard and the shard's tar say the same: counts, names, order and places."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from ebt_megatron.core.errors import DataError
from ebt_megatron.data.kinds import kind_of, part_name
from ebt_megatron.data.manifest import Manifest, ShardInfo
from ebt_megatron.data.shards import Member

_BLOCK = 512  # bytes of a tar's headers, and what its members begin at multiples of
_KEYS = {"samples", "bytes", "sha256", "members"}


def manifest_problems(manifest: Manifest) -> list[str]:
    """What in a manifest contradicts itself: shards that are there twice, and counts."""
    names = Counter(shard.name for shard in manifest.shards)
    problems = [f"shard {name} is listed {count} times" for name, count in names.items() if count > 1]
    problems += [f"shard {shard.name} has {shard.samples} samples" for shard in manifest.shards if shard.samples < 1]
    total = sum(shard.samples for shard in manifest.shards)
    if total != manifest.samples:
        problems.append(f"{manifest.samples} samples, its shards have {total}")
    return problems


def members_of(content: str, shard: ShardInfo, manifest: Manifest) -> list[Member]:
    """The members that an index lists.

    Args:
        content: of the index file.
        shard: whose it is.
        manifest: of the folder.

    Raises:
        DataError: if it is no index, or says something else than the manifest.
    """
    try:
        index = json.loads(content)
        members = [Member(str(name), int(offset), int(size), int(n)) for name, offset, size, n in index["members"]]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{shard.index_name} is no index ({error}): prepare the data again") from None
    problems = _differences(index, shard) + list(layout_problems(members, shard, manifest))
    problems += [
        f"member {b.name} at {b.offset} does not follow {a.name}, which ends at {a.offset + a.bytes}"
        for a, b in itertools.pairwise(members)
        if b.offset != -(-(a.offset + a.bytes) // _BLOCK) * _BLOCK + _BLOCK
    ]
    if members and (members[0].offset != _BLOCK or members[-1].offset + members[-1].bytes > shard.bytes):
        problems.append(f"its members are not from byte {_BLOCK} on within the {shard.bytes} bytes of the tar")
    if problems:
        raise DataError(f"{shard.index_name} does not fit the manifest: {problems[0]}; prepare the data again")
    return members


def _differences(index: dict[str, Any], shard: ShardInfo) -> list[str]:
    problems = [f"the keys {sorted(set(index) ^ _KEYS)} are unknown or missing"] if set(index) != _KEYS else []
    for key in ("samples", "bytes", "sha256"):
        if key in index and index[key] != getattr(shard, key):
            problems.append(f"{key} {index[key]}, the manifest says {getattr(shard, key)}")
    return problems


def layout_problems(members: list[Member], shard: ShardInfo, manifest: Manifest) -> Iterable[str]:
    """What is wrong with the names, order and counts of a shard's members."""
    kind = kind_of(manifest.kind)
    by_part: dict[str, list[Member]] = {name: [] for name in kind.parts(manifest)}
    for member in members:
        if part_name(member.name) not in by_part:
            yield f"member {member.name} is not what the manifest speaks of"
            return
        by_part[part_name(member.name)].append(member)
    for name, found in by_part.items():
        for a, b in itertools.pairwise(found):
            if a.name >= b.name:
                yield f"member {b.name} comes after {a.name}"
            elif a.samples != kind.rows:
                yield f"member {a.name} has {a.samples} samples, not {kind.rows}"
        total = sum(member.samples for member in found)
        if total != shard.samples or any(not 1 <= member.samples <= kind.rows for member in found):
            yield f"members of {name} have {total} samples, the manifest says {shard.samples}"

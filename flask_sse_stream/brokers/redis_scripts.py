"""What Redis is asked to do, and what a message looks like on its way: Lua in, bytes out. Knows no connection.

Everything of a namespace lies in one hash slot, so that one script may touch it and a cluster takes it as it is::

    {sse}:log         hash: epoch, seq (of the newest event), run (of the server), lives, floor
    {sse}:keys        sorted set: the key of each pool, by the seq of its newest event
    {sse}:k:<key>     stream: the recent events of a pool; the channel of the same name takes them live
    {sse}:all         the same for what goes to all
    {sse}:once:<key>  string: the id of the event that an idempotency key has made
    {sse}:lease:<name> string: who holds a lease

A script is one step: nobody sees an event in the history that was not sent, or the other way round. It writes nothing
before the first command that Redis may refuse for want of memory or for a key of another type.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from ..event import is_body

__all__ = ["LEASE", "PUBLISH", "READ", "Entry", "Found", "Names", "Reading", "live_message", "new_life", "reading"]

# The log's life. A server that was started anew, or a replica that was promoted, may have lost its latest writes, and
# would give their numbers out again. So such a one begins a new life, which remembers where it took over from the
# one before. ARGV: the server's run id, and a name for a new life.
_LIFE: Final = """
local log, latest = KEYS[1], KEYS[2]
local state = redis.call('HMGET', log, 'epoch', 'seq', 'run', 'lives', 'floor')
local epoch, seq, lives, floor = state[1], tonumber(state[2] or '0'), state[4] or '', state[5] or '0'
if not epoch or (seq > 0 and redis.call('EXISTS', latest) == 0) then
  redis.call('DEL', log, latest)
  epoch, seq, lives, floor = ARGV[2], 0, '', '0'
  redis.call('HSET', log, 'epoch', epoch, 'seq', '0', 'run', ARGV[1], 'lives', '', 'floor', '0')
elseif state[3] ~= ARGV[1] then
  local kept = {}
  for life in string.gmatch(epoch .. ':' .. state[2] .. ' ' .. lives, '%S+') do
    if #kept < 32 then kept[#kept + 1] = life end
  end
  epoch, lives = ARGV[2], table.concat(kept, ' ')
  redis.call('HSET', log, 'epoch', epoch, 'run', ARGV[1], 'lives', lives)
end
"""

# KEYS: log, keys, the stream, and that of the idempotency key if there is one.
# ARGV: run, a new life, the key, its body, an id of the user's own, size and milliseconds of the history, milliseconds
# of the idempotency key, how to publish.
PUBLISH: Final = (
    """
if KEYS[4] then
  local made = redis.call('GET', KEYS[4])
  if made then return {made} end
end
"""
    + _LIFE
    + """
local before = redis.call('ZSCORE', latest, ARGV[3])
if not before then
  before = floor
  -- Left over from a life that was lost: its numbers would be in the way.
  if redis.call('TYPE', KEYS[3]).ok == 'stream' then redis.call('DEL', KEYS[3]) end
end
local place = string.format('%.0f', seq + 1)
if tonumber(ARGV[6]) > 0 then
  local now = redis.call('TIME')
  local add = {'XADD', KEYS[3], 'MAXLEN', '~', ARGV[6], place .. '-0', 'b', ARGV[4], 'p', before,
    't', string.format('%.0f', now[1] * 1000 + math.floor(now[2] / 1000))}
  local added = redis.pcall(unpack(add))
  if type(added) == 'table' and added.err then
    if not string.find(added.err, 'equal or smaller') then return added end
    redis.call('DEL', KEYS[3])  -- somebody else has written to it
    redis.call(unpack(add))
  end
  redis.call('PEXPIRE', KEYS[3], ARGV[7])
end
redis.call('HSET', log, 'seq', place)
redis.call('ZADD', latest, place, ARGV[3])
local identifier = ARGV[5] ~= '' and ARGV[5] or epoch .. '-' .. place
if KEYS[4] then redis.call('SET', KEYS[4], identifier, 'PX', ARGV[8]) end
if redis.call('ZCARD', latest) > 10000 then
  -- Of very many keys, know one floor for those whose history is gone.
  local oldest = redis.call('ZRANGE', latest, 0, 0, 'WITHSCORES')
  local stream = string.sub(oldest[1], 1, 2) == 'k:' and string.sub(log, 1, -4) .. oldest[1]
  if stream and redis.call('EXISTS', stream) == 0 then
    redis.call('ZREM', latest, oldest[1])
    redis.call('HSET', log, 'floor', oldest[2])
  end
end
redis.call(ARGV[9], KEYS[3], '1 ' .. epoch .. ' ' .. place .. ' ' .. before .. '\\n' .. ARGV[4])
return {identifier}
"""
)

# KEYS: log, keys, and the streams that are asked for.
# ARGV: run, a new life, how many events of each, then for each stream its key and the number to begin after; '-' for
# no events at all.
READ: Final = (
    _LIFE
    + """
local found = {}
for at = 3, #KEYS do
  local name, after = ARGV[2 * at - 2], ARGV[2 * at - 1]
  local last = redis.call('ZSCORE', latest, name)
  local events = {}
  if last and after ~= '-' and tonumber(last) > tonumber(after) and tonumber(ARGV[3]) > 0 then
    events = redis.pcall('XREVRANGE', KEYS[at], last .. '-0', '(' .. after .. '-0', 'COUNT', ARGV[3])
    if events.err then events = {} end
  end
  found[#found + 1] = {last or floor, events}
end
local now = redis.call('TIME')
return {'sse', epoch, string.format('%.0f', seq), lives,
  string.format('%.0f', now[1] * 1000 + math.floor(now[2] / 1000)), found}
"""
)

# KEYS: the lease. ARGV: who wants it, and for how many milliseconds; 0 to give it back.
LEASE: Final = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
if tonumber(ARGV[2]) > 0 then
  redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
elseif holder then
  redis.call('DEL', KEYS[1])
end
return 1
"""


class Names:
    """The names in Redis of what belongs to a namespace. No character of a key has a meaning in them."""

    def __init__(self, namespace: str) -> None:
        self._prefix = f"{{{namespace}}}:".encode()
        self.log = self._prefix + b"log"
        self.keys = self._prefix + b"keys"

    @staticmethod
    def member(key: str | None) -> bytes:
        """Name a key in the sorted set."""
        return b"all" if key is None else b"k:" + key.encode()

    def stream(self, key: str | None) -> bytes:
        """Name a key's stream, and its channel."""
        return self._prefix + self.member(key)

    def once(self, idempotency_key: str) -> bytes:
        """Name what remembers an idempotency key."""
        return self._prefix + b"once:" + idempotency_key.encode()

    def lease(self, name: str) -> bytes:
        """Name a lease."""
        return self._prefix + b"lease:" + name.encode()


def new_life() -> str:
    """Name a life of the log, should it need one."""
    return secrets.token_hex(6)


class Live(NamedTuple):
    """A message as it came by: its place, and the number of the event before it of the same key.

    ``body`` is ``None`` if it is none, or too large.
    """

    epoch: str
    seq: int
    previous: int
    body: bytes | None


_LIVE: Final = re.compile(rb"1 ([0-9a-f]{12}) ([1-9][0-9]{0,15}) ([0-9]{1,16})\n")


def live_message(payload: Any, limit: int) -> Live | None:
    """Take a message of a channel apart; ``None`` for what is none. ``limit`` is in bytes."""
    match = _LIVE.match(payload) if isinstance(payload, bytes) else None
    if match is None:
        return None
    body = payload[match.end() :] if len(payload) - match.end() <= limit else b""
    return Live(match[1].decode(), int(match[2]), int(match[3]), body if is_body(body) else None)


class Entry(NamedTuple):
    """An event as the history has it. ``created`` is seconds before it was read."""

    seq: int
    previous: int
    body: bytes
    age: float


class Found(NamedTuple):
    """What the log has of one key: the number of its newest event, and the latest, oldest first.

    Every event after ``floor`` is among them.
    """

    last: int
    floor: int
    entries: Sequence[Entry]
    skipped: int


class Reading(NamedTuple):
    """What the script READ found: the log's place at one moment, and what it has of the keys that were asked for."""

    epoch: str
    head: int
    earlier: Mapping[str, int]
    found: Sequence[Found]


def reading(reply: Sequence[Any], limit: int) -> Reading:
    """Take the reply of READ apart, and leave out what is no event."""
    _, epoch, head, lives, now, found = reply
    earlier: dict[str, int] = {}
    for life in lives.decode().split():
        name, _, last = life.partition(":")
        earlier.setdefault(name, int(last))
    return Reading(
        epoch.decode(),
        int(head),
        earlier,
        [_found(int(last), entries, int(now), limit) for last, entries in found],
    )


def _found(last: int, raw: Sequence[Any], now: int, limit: int) -> Found:
    """Keep what is a chain: each event names the one before it, and the newest is the key's last."""
    chain: list[Entry] = []
    skipped = 0
    expected = last
    for item in raw:  # newest first
        entry = _entry(item, now, limit)
        if entry is None:
            skipped += 1
            continue
        if entry.seq != expected:
            break
        chain.append(entry)
        expected = entry.previous
    chain.reverse()
    return Found(last, expected, chain, skipped)


def _entry(item: Any, now: int, limit: int) -> Entry | None:
    try:
        identifier, flat = item
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        seq, previous, created = int(identifier.removesuffix(b"-0")), int(fields[b"p"]), int(fields[b"t"])
        body = fields[b"b"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if len(body) > limit or not is_body(body) or not 0 <= previous < seq:
        return None
    return Entry(seq, previous, body, max(0.0, (now - created) / 1000))

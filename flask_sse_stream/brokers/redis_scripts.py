"""What Redis is asked to do, and what a message looks like on its way: Lua in, bytes out. Knows no connection.

Everything of a namespace lies in one hash slot, so that one script may touch it and a cluster takes it as it is::

    {sse}:log         hash: epoch, seq (of the newest event), run (of the server), lives, floor
    {sse}:keys        sorted set: the key of each pool, by the seq of its newest event
    {sse}:k:<key>     stream: the recent events of a pool or a job; the channel of the same name takes them live
    {sse}:all         the same for what goes to all
    {sse}:once:<key>  string: the id of the event that an idempotency key has made
    {sse}:lease:<name> string: who holds a lease
    {sse}:mark:<name>  string: when something was revoked last

A script is one step: nobody sees an event in the history that was not sent, or the other way round. It writes nothing
before the first command that Redis may refuse for want of memory or for a key of another type.
"""

from __future__ import annotations

import math
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from ..event import Message, is_body
from .base import History

__all__ = [
    "LEASE",
    "MARK",
    "PUBLISH",
    "READ",
    "READ_KEYS",
    "Chain",
    "Entry",
    "Names",
    "Reading",
    "live_message",
    "message",
    "new_life",
    "read_command",
    "reading",
]

# The log's life. A server that was started anew, or a replica that was promoted, may have lost its latest writes, and
# would give their numbers out again. So such a one begins a new life, which remembers where it took over from the
# one before. ARGV: the server's run id, and a name for a new life.
_LIFE: Final = """
local log, latest = KEYS[1], KEYS[2]
local state = redis.call('HMGET', log, 'epoch', 'seq', 'run', 'lives', 'floor')
local function is_place(text) return text and #text < 17 and string.find(text, '^%d+$') end
local epoch, lives = state[1], state[4] or ''
local seq, floor = is_place(state[2]) and tonumber(state[2]) or 0, is_place(state[5]) and state[5] or '0'
local is_ours = epoch and #epoch == 12 and string.find(epoch, '^[0-9a-f]+$') and is_place(state[2])
if not is_ours or (seq > 0 and redis.call('EXISTS', latest) == 0) then
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
# ARGV: run, a new life, whether there is a history, then for each stream its key and the number to begin after; '-' for
# no events at all. What a reply may hold is bounded: Redis cuts a connection off that has too much waiting for it, and
# does nothing else while it gathers it. A key whose events did not fit is marked, and asked for again from there.
READ: Final = (
    _LIFE
    + """
local found, room = {}, 1000000
for at = 3, #KEYS do
  local name, after = ARGV[2 * at - 2], ARGV[2 * at - 1]
  local last = redis.call('ZSCORE', latest, name)
  local events, more = {}, 0
  if last and after ~= '-' and tonumber(last) > tonumber(after) and tonumber(ARGV[3]) > 0 then
    local from, count = '(' .. after .. '-0', 8
    while true do
      if room <= 0 then
        more = 1
        break
      end
      local page = redis.pcall('XRANGE', KEYS[at], from, last .. '-0', 'COUNT', count)
      if page.err then
        if not string.find(page.err, 'WRONGTYPE') then return page end
        break
      end
      local bytes = 0
      for _, event in ipairs(page) do
        events[#events + 1] = event
        for _, part in ipairs(event[2]) do bytes = bytes + #part end
      end
      room = room - bytes - 50 * #page
      if #page < count then break end
      from = '(' .. page[#page][1]
      if bytes < 65536 then count = math.min(2 * count, 256) end
    end
  end
  found[#found + 1] = {last or floor, events, more}
end
local now = redis.call('TIME')
return {'sse', epoch, string.format('%.0f', seq), lives,
  string.format('%.0f', now[1] * 1000 + math.floor(now[2] / 1000)), found}
"""
)

READ_KEYS: Final = 500
"""How many keys to ask for in one reading: others wait for it."""

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

# KEYS: the mark. ARGV: when, and for how many milliseconds.
MARK: Final = """
local at, ttl = ARGV[1], tonumber(ARGV[2])
local known = tonumber(redis.call('GET', KEYS[1]) or '0')
if known and known > tonumber(at) then at = redis.call('GET', KEYS[1]) end
redis.call('SET', KEYS[1], at, 'PX', string.format('%.0f', math.max(ttl, redis.call('PTTL', KEYS[1]))))
return 1
"""


class Names:
    """The names in Redis of what belongs to a namespace. No character of a key has a meaning in them."""

    def __init__(self, namespace: str) -> None:
        self._prefix = f"{{{namespace}}}:".encode()
        self.log: bytes = self._prefix + b"log"
        self.keys: bytes = self._prefix + b"keys"

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

    def mark(self, name: str) -> bytes:
        """Name what says when something was revoked."""
        return self._prefix + b"mark:" + name.encode()


def new_life() -> str:
    """Name a life of the log, should it need one."""
    return secrets.token_hex(6)


def read_command(
    names: Names, run: str, asked: Mapping[str | None, int | None], *, history: bool
) -> Sequence[bytes | str | int]:
    """Give the command that reads of each key what comes after a number; ``None``: only which event is its newest."""
    keys = [names.log, names.keys, *(names.stream(key) for key in asked)]
    arguments: list[bytes | str | int] = [run, new_life(), int(history)]
    for key, after in asked.items():
        arguments += [names.member(key), "-" if after is None else after]
    return ["EVAL", READ, len(keys), *keys, *arguments]


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


class Page(NamedTuple):
    """What one reading has of a key: the number of its newest event, and entries, oldest first.

    ``more``
        whether there are more, which did not fit.
    ``end``
        the number up to which was read, whatever was found there.
    """

    last: int
    entries: Sequence[Entry]
    more: bool
    end: int
    skipped: int


_EARLIER: Final = re.compile(rb"\b([0-9a-f]{12}):([0-9]{1,16})\b")


class Reading(NamedTuple):
    """What the script READ found: the log's place at one moment, and what it has of the keys that were asked for."""

    epoch: str
    head: int
    earlier: Mapping[str, int]
    pages: Sequence[Page]


def reading(reply: Sequence[Any], limit: int) -> Reading:
    """Take the reply of READ apart, and leave out what is no event, or larger than ``limit`` bytes."""
    _, epoch, head, lives, now, found = reply
    earlier: dict[str, int] = {}
    for name, last in _EARLIER.findall(lives):
        earlier.setdefault(name.decode(), int(last))
    pages = [_page(int(last), raw, bool(more), int(now), limit) for last, raw, more in found]
    return Reading(epoch.decode(), int(head), earlier, pages)


def _page(last: int, raw: Sequence[Any], more: bool, now: int, limit: int) -> Page:
    entries = [_entry(item, now, limit) for item in raw]
    kept = [entry for entry in entries if entry is not None]
    end = int(raw[-1][0].partition(b"-")[0]) if raw else 0
    return Page(last, kept, more, end, len(entries) - len(kept))


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


class Chain:
    """The events of one key after a number, put together from pages.

    ``reached``
        the number of the newest event that is in, at first the number to begin after.
    ``floor``
        every event after it is among ``entries``; ``None``: all after the number to begin after are.
    ``more``
        whether there are pages to come, which begin after ``end``.
    """

    def __init__(self, after: int) -> None:
        self.reached: int = after
        self.end: int = after
        self.floor: int | None = None
        self.entries: list[Entry] = []
        self.more: bool = True
        self.skipped: int = 0

    def add(self, page: Page) -> None:
        """Put the next page in. Each event names the one before it; what does not follow leaves a gap."""
        for entry in page.entries:
            if entry.previous != self.reached:
                self._break(entry.previous)
            self.entries.append(entry)
            self.reached = entry.seq
        self.skipped += page.skipped
        # One that brings nothing is the last, or a stream that is not ours would be read for ever.
        self.more = page.more and (page.end > self.end or not page.end)
        self.end = max(self.end, page.end)
        if not self.more:
            if self.reached != page.last:
                self._break(page.last)  # What the log says it has is not there, or the other way round.
            self.reached = self.end = page.last

    def _break(self, floor: int) -> None:
        self.floor = floor
        self.entries.clear()

    def history(self, key: str | None, epoch: str, head: int, size: int, ttl: float, whole: bool = False) -> History:
        """Give what was read of ``key`` up to ``head``: at most ``size`` events, none older than ``ttl`` seconds.

        With ``whole`` all of them are young enough if the newest is.
        """
        if whole and self.entries and self.entries[-1].age <= ttl:
            ttl = math.inf
        kept = [entry for entry in self.entries if entry.age <= ttl and entry.seq <= head][-size:] if size else []
        if kept:
            floor = kept[0].previous
        else:
            later = [entry.previous for entry in self.entries if entry.seq > head and entry.age <= ttl]
            # What the log has lost after the head is not lost here: it is yet to be heard.
            floor = min(later[0] if later else self.reached, head)
        return History(key, epoch, floor, [message(key, epoch, entry, size) for entry in kept], head)


def message(key: str | None, epoch: str, entry: Entry, size: int) -> Message:
    """Make the message that an entry of a log with so many events of history is."""
    created = time.monotonic() - entry.age
    return Message(key, epoch, entry.seq, entry.body, created, resumable=size > 0)

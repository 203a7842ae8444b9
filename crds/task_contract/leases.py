"""How operator and workers hand tasks to one another in Redis: keys, scripts, messages. No I/O.

Of each pool Redis holds three streams, one a priority, read through the consumer group :data:`GROUP`: an entry that was
delivered and not acknowledged is a lease, its idle time the silence of the worker. Everything that changes a lease is one
script, so it happens whole or not at all.

**All of it may be lost.** The tasks are in the API server. The operator offers every task that should be here and is not,
each second; offering one twice is offering it once. A report that is lost is one of an attempt whose result PostgreSQL has,
or that is carried out once more; what a task may change is fenced in the ledger, never here.

What makes each step safe, whoever dies after it:

- *offered*: the next look offers it again, which changes nothing.
- *taken*: the lease runs out, and the task goes to another worker as the next attempt.
- *result in PostgreSQL → report*: the lease runs out; the result is looked for before the attempt is judged.
- *report written → status written*: reports stay in their stream until the status says what they say; an operator begins by
  reading all that are there.

Redis 7.0 or later.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final

from pydantic import AwareDatetime, Field

from task_contract.messages import AttemptOutcome
from task_contract.models import Model, Priority
from task_contract.names import GROUP as API_GROUP

GROUP: Final = "workers"
"""Consumer group of the streams; each worker is a consumer, under the name of its pod."""

STREAM_OF: Final = {Priority.HIGH: 1, Priority.NORMAL: 2, Priority.LOW: 3}
"""Number of a priority's stream, which is also its place among the keys."""

KEPT_SECONDS: Final = 604_800
"""How long what a pool has in Redis outlives the last look of an operator: a week. A pool that was deleted while no operator
was there leaves nothing for ever; of one whose operator was away for longer all is offered again."""

INLINE_TASK: Final = 8192
"""Bytes of a task that may stand in a stream; a larger one stands in a hash beside it, and the entry refers to it."""


@dataclass(frozen=True, slots=True)
class PoolKeys:
    """The keys of a pool. All of them are in one slot of a Redis Cluster."""

    namespace: str
    pool: str

    @property
    def base(self) -> str:
        """What they begin with."""
        return f"{API_GROUP}:pool:{{{self.namespace}/{self.pool}}}"

    @property
    def streams(self) -> tuple[str, str, str]:
        """Of high, normal and low priority."""
        return f"{self.base}:high", f"{self.base}:normal", f"{self.base}:low"

    @property
    def reports(self) -> str:
        """The stream of what workers say."""
        return f"{self.base}:reports"

    @property
    def large(self) -> str:
        """The hash of tasks that are too large for a stream, by uid."""
        return f"{self.base}:large"

    @property
    def control(self) -> str:
        """The pub/sub channel on which workers hear of a withdrawal at once: the uid of the task; or ``drain``."""
        return f"{self.base}:control"

    @property
    def all(self) -> tuple[str, ...]:
        """What every script is given, in this order."""
        rest = ("entries", "large", "reports", "workers", "drain", "turns", "control")
        return *self.streams, *(f"{self.base}:{name}" for name in rest)


class ReportKind(StrEnum):
    """What a report is about."""

    RUNNING = "running"
    """The attempt runs for longer than a moment: worth a status of its own."""
    ENDED = "ended"
    EXPIRED = "expired"
    """The worker was silent for longer than its lease: the attempt is over."""


class PoolReport(Model):
    """What became of a task that was offered to a pool."""

    kind: ReportKind
    uid: str
    namespace: str
    name: str
    attempt: Annotated[int, Field(ge=1)]
    stamp: str
    """Which stay in the queue it was offered under, as on a Job."""
    worker: str
    """Name of the pod."""
    job: str = ""
    """Name of the worker's Job."""
    offered_at: AwareDatetime | None = None
    started_at: AwareDatetime | None = None
    """When the worker took it."""
    finished_at: AwareDatetime | None = None
    outcome: AttemptOutcome | None = None
    """Of one that ended."""


class WorkerState(Model):
    """What a worker says of itself with each renewal; counters only grow, from its start on."""

    worker: str
    job: str = ""
    revision: str = ""
    ready: bool = False
    """Whether its model is loaded, and it takes tasks."""
    draining: bool = False
    """Whether it takes no more."""
    leased: Annotated[int, Field(ge=0)] = 0
    """Tasks that it has."""
    capacity: Annotated[int, Field(ge=0)] = 0
    """Tasks that it can have at once."""
    load_seconds: float = 0
    """From the start of the process to the first task that it could take."""
    tasks: Annotated[int, Field(ge=0)] = 0
    """Attempts that it has ended."""
    renewals: Annotated[int, Field(ge=0)] = 0
    calls: Annotated[int, Field(ge=0)] = 0
    """Calls of the model."""
    texts: Annotated[int, Field(ge=0)] = 0
    """Texts in them."""
    room: Annotated[int, Field(ge=0)] = 0
    """Texts that would have fitted in them: full calls have as many texts as room."""


# ------------------------------------------------------------------------------------------------------------- scripts
# Each is given PoolKeys.all as its keys. An entry of ``entries`` is "attempt|stamp|stream|id" by the uid of the task.

_PRELUDE: Final = """
local ENTRIES, LARGE, REPORTS = KEYS[4], KEYS[5], KEYS[6]
local WORKERS, DRAIN, TURNS, CONTROL = KEYS[7], KEYS[8], KEYS[9], KEYS[10]
local function parts(entry)
  return string.match(entry, '^(%d+)|([^|]*)|(%d)|(.*)$')
end
local function holder(n, id)
  local pending = redis.pcall('XPENDING', KEYS[n], 'workers', id, id, 1)
  return not pending.err and pending[1] and pending[1][2] or ''
end
local function forget(uid, n, id)
  redis.pcall('XACK', KEYS[n], 'workers', id)
  redis.call('XDEL', KEYS[n], id)
  redis.call('HDEL', ENTRIES, uid)
  redis.call('HDEL', LARGE, uid)
end
local function ensure(n)
  redis.pcall('XGROUP', 'CREATE', KEYS[n], 'workers', '0', 'MKSTREAM')
end
local function fields(entry)
  local found = {}
  for i = 1, #entry, 2 do found[entry[i]] = entry[i + 1] end
  return found
end
local function position(n)
  local groups = redis.pcall('XINFO', 'GROUPS', KEYS[n])
  for _, group in ipairs(groups.err and {} or groups) do
    local values = fields(group)
    if values['name'] == 'workers' then return values['last-delivered-id'] end
  end
  return '0-0'
end
"""

OFFER: Final = (
    _PRELUDE
    + """
local n, uid, attempt, stamp, rank, at, task = tonumber(ARGV[1]), ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7]
local known = redis.call('HGET', ENTRIES, uid)
if known then
  local a, s, m, id = parts(known)
  m = tonumber(m)
  if a == attempt and s == stamp and (m == n or holder(m, id) ~= '') then return 0 end
  forget(uid, m, id)
end
ensure(n)
local values = {'uid', uid, 'attempt', attempt, 'stamp', stamp, 'rank', rank, 'at', at}
if #task > INLINE then
  redis.call('HSET', LARGE, uid, task)
else
  values[#values + 1] = 'task'
  values[#values + 1] = task
end
local id = redis.call('XADD', KEYS[n], '*', unpack(values))
redis.call('HSET', ENTRIES, uid, attempt .. '|' .. stamp .. '|' .. n .. '|' .. id)
return 1
""".replace("INLINE", str(INLINE_TASK))
)
"""Arguments: number of the stream, uid, attempt, stamp, rank (seconds since the epoch, head start included: lower goes
first), now (ISO 8601), the task as JSON. Returns 1, or 0 if it is here already. What waits under another priority moves."""

TAKE: Final = (
    _PRELUDE
    + """
local worker, count, taken = ARGV[1], tonumber(ARGV[2]), {}
local function head(n)
  local found = redis.call('XRANGE', KEYS[n], '(' .. position(n), '+', 'COUNT', 1)
  return found[1] and tonumber(fields(found[1][2])['rank']) or nil
end
if redis.call('SISMEMBER', DRAIN, worker) == 1 then return taken end
while #taken < count do
  local ranks, first = {}, nil
  for n = 1, 3 do
    ranks[n] = head(n)
    if ranks[n] and (not first or ranks[n] < ranks[first]) then first = n end
  end
  if not first then break end
  -- One pick in 4 is a normal one's and one in 16 a low one's, whatever waits above them.
  local turn = redis.call('HINCRBY', TURNS, 'turn', 1)
  if turn % 16 == 0 and ranks[3] then first = 3 elseif turn % 4 == 0 and ranks[2] then first = 2 end
  ensure(first)
  local answer = redis.call('XREADGROUP', 'GROUP', 'workers', worker, 'COUNT', 1, 'STREAMS', KEYS[first], '>')
  if not answer then break end
  local entry = answer[1][2][1]
  local value = fields(entry[2])
  local known = redis.call('HGET', ENTRIES, value['uid'])
  local a, s, m, id
  if known then a, s, m, id = parts(known) end
  if id == entry[1] and tonumber(m) == first then
    local task = value['task'] or redis.call('HGET', LARGE, value['uid'])
    if task then
      taken[#taken + 1] = {first, id, value['uid'], value['attempt'], value['stamp'], value['at'], task}
    else
      forget(value['uid'], first, id)
    end
  else
    -- Of nobody any more. Entries of other streams may have the same number.
    redis.call('XACK', KEYS[first], 'workers', entry[1])
    redis.call('XDEL', KEYS[first], entry[1])
  end
end
return taken
"""
)
"""Arguments: worker, most tasks. Returns leases: stream, id, uid, attempt, stamp, offered at, task as JSON. Who is to drain
gets none. Never waits."""

RENEW: Final = (
    _PRELUDE
    + """
local worker, state, lost = ARGV[1], ARGV[2], {}
local time = redis.call('TIME')
redis.call('HSET', WORKERS, worker, time[1] .. '|' .. state)
for i = 3, #ARGV, 3 do
  local n, id, uid = tonumber(ARGV[i]), ARGV[i + 1], ARGV[i + 2]
  if holder(n, id) == worker then
    redis.call('XCLAIM', KEYS[n], 'workers', worker, 0, id, 'JUSTID')
  else
    lost[#lost + 1] = uid
  end
end
return {redis.call('SISMEMBER', DRAIN, worker), lost}
"""
)
"""Arguments: worker, its state as JSON, and of each lease stream, id and uid. Returns whether it is to drain, and the uids
of leases that it does not hold any more."""

REPORT: Final = (
    _PRELUDE
    + """
local worker, taken = ARGV[1], {}
for i = 2, #ARGV, 5 do
  local kind, n, id, uid, report = ARGV[i], tonumber(ARGV[i + 1]), ARGV[i + 2], ARGV[i + 3], ARGV[i + 4]
  local known = redis.call('HGET', ENTRIES, uid)
  local mine = false
  if known then
    local _, _, _, current = parts(known)
    mine = current == id and holder(n, id) == worker
  end
  if mine and kind == 'ended' then forget(uid, n, id) end
  -- Without an entry Redis was wiped, or the task withdrawn: the operator knows better whether it still wants to hear.
  if mine or (not known and kind == 'ended') then
    redis.call('XADD', REPORTS, '*', 'report', report)
    taken[#taken + 1] = 1
  else
    taken[#taken + 1] = 0
  end
end
return taken
"""
)
"""Arguments: worker, and of each report kind, stream, id, uid and the :class:`PoolReport` as JSON. Returns for each 1, or 0
when somebody else has the task by now. What has ended is no lease any more."""

LOOK: Final = (
    _PRELUDE
    + """
local lease, now, waiting, leased = ARGV[1], ARGV[2], {}, 0
local gone = 0
for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, KEPT) end
for n = 1, 3 do
  local late = redis.pcall('XPENDING', KEYS[n], 'workers', 'IDLE', lease, '-', '+', 100)
  for _, pending in ipairs(late.err and {} or late) do
    local entry = redis.call('XRANGE', KEYS[n], pending[1], pending[1])[1]
    local value = entry and fields(entry[2]) or {}
    local known = value['uid'] and redis.call('HGET', ENTRIES, value['uid'])
    local _, _, _, current = parts(known or '')
    if current == pending[1] then
      redis.call('XADD', REPORTS, '*', 'expired', value['uid'], 'attempt', value['attempt'], 'stamp', value['stamp'],
        'worker', pending[2], 'at', value['at'], 'now', now)
      forget(value['uid'], n, pending[1])
      gone = gone + 1
    else
      redis.call('XACK', KEYS[n], 'workers', pending[1])
      redis.call('XDEL', KEYS[n], pending[1])
    end
  end
  local pending = redis.pcall('XPENDING', KEYS[n], 'workers')
  local held = not pending.err and pending[1] or 0
  leased = leased + held
  waiting[n] = redis.call('XLEN', KEYS[n]) - held
end
return {gone, leased, waiting, redis.call('HKEYS', ENTRIES), redis.call('HGETALL', WORKERS), redis.call('TIME')[1]}
""".replace("KEPT", str(KEPT_SECONDS))
)
"""Arguments: the lease in milliseconds, now (ISO 8601). Ends leases that ran out, each with a report. Returns how many; how
many are held; how many tasks wait in each stream; the uids of all that are here; the workers, as name and "second|state";
and the second that it is by Redis' clock."""

WITHDRAW: Final = (
    _PRELUDE
    + """
local uid = ARGV[1]
local known = redis.call('HGET', ENTRIES, uid)
if not known then return '' end
local _, _, n, id = parts(known)
n = tonumber(n)
local worker = holder(n, id)
forget(uid, n, id)
if worker ~= '' then redis.call('PUBLISH', CONTROL, uid) end
return worker
"""
)
"""Arguments: uid. Takes a task back, and tells its worker to stop. Returns the worker's name, or nothing if it had none."""

DRAIN: Final = (
    _PRELUDE
    + """
redis.call('DEL', DRAIN)
if #ARGV > 0 then
  redis.call('SADD', DRAIN, unpack(ARGV))
  redis.call('PUBLISH', CONTROL, 'drain')
end
return redis.status_reply('OK')
"""
)
"""Arguments: the workers that are to end as soon as they have finished what they have; all others go on."""

DISMISS: Final = (
    _PRELUDE
    + """
for _, worker in ipairs(ARGV) do
  redis.call('HDEL', WORKERS, worker)
  redis.call('SREM', DRAIN, worker)
  for n = 1, 3 do
    local held = redis.pcall('XPENDING', KEYS[n], 'workers', '-', '+', 1, worker)
    if not held.err and not held[1] then redis.pcall('XGROUP', 'DELCONSUMER', KEYS[n], 'workers', worker) end
  end
end
return redis.status_reply('OK')
"""
)
"""Arguments: workers whose pods are gone. Leases that they hold stay, until they run out."""

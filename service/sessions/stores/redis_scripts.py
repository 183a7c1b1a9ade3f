"""What Redis does with one session in one piece: Lua."""

from __future__ import annotations

# All of a session's keys and names; `counted` remembers what the totals have of it, should its hash run out.
_SESSION = """
local session, ids, used, tenant_used, counted, totals, tenant_totals, parked_totals, connection = unpack(KEYS)
local name, id, connection_number, fence = unpack(ARGV, 1, 4)

-- What an earlier connection of this owner sent, and nobody waits for any more, may arrive late.
if redis.call('GET', connection) ~= connection_number then
    return redis.error_reply('STALE this connection is not the newest of its owner')
end

local function add(sessions, value)
    local parked, size, model = value:match('(%d):(%d+):(.+)')
    local function raise(key, of)
        redis.call('HINCRBY', key, 'size_bytes' .. of, string.format('%d', sessions * size))  -- never -0
        if redis.call('HINCRBY', key, 'sessions' .. of, sessions) == 0 then
            redis.call('HDEL', key, 'size_bytes' .. of, 'sessions' .. of)
        end
    end
    raise(totals, '')
    raise(tenant_totals, '')
    if parked == '1' then raise(parked_totals, ':' .. model) end
end

local function count(size, owner, model)
    local value = (owner == '' and 1 or 0) .. ':' .. size .. ':' .. model
    local before = redis.call('HGET', counted, name)
    if before ~= value then
        if before then add(-1, before) end
        add(1, value)
        redis.call('HSET', counted, name, value)
    end
end

local function forget()
    local before = redis.call('HGET', counted, name)
    if before then add(-1, before) end
    redis.call('HDEL', counted, name)
    redis.call('ZREM', ids, id)
    redis.call('ZREM', used, name)
    redis.call('ZREM', tenant_used, name)
    redis.call('UNLINK', session)
end

local found = redis.call('HGET', session, 'fence')
"""

# 1, or 0 if it is not for this owner to write.
WRITE = (
    _SESSION
    + """
local is_new, owner, size, model, used_s, ttl_ms, summary, record = unpack(ARGV, 5)
if found ~= fence and (found or is_new == '0') then
    return 0
end
redis.call('HSET', session, 'fence', fence, 'owner', owner, 'summary', summary, 'record', record)
if owner == '' then redis.call('PEXPIRE', session, ttl_ms) else redis.call('PERSIST', session) end
redis.call('ZADD', ids, 0, id)
redis.call('ZADD', used, used_s, name)
redis.call('ZADD', tenant_used, used_s, name)
count(size, owner, model)
return 1
"""
)

# Record, fence and owner; or nothing.
TAKE = (
    _SESSION
    + """
local me, lease = unpack(ARGV, 5)
local owner = redis.call('HGET', session, 'owner')
if found ~= fence or (owner ~= '' and owner ~= me and redis.call('EXISTS', lease .. owner) == 1) then
    return false
end
redis.call('HINCRBY', session, 'fence', 1)  -- not in Lua, whose numbers are floats
redis.call('HSET', session, 'owner', me)
redis.call('PERSIST', session)
local size, model = redis.call('HGET', counted, name):match(':(%d+):(.+)')
count(size, me, model)
return redis.call('HMGET', session, 'record', 'fence', 'owner')
"""
)

# Also of a session whose hash has run out, whatever the fence.
ERASE = (
    _SESSION
    + """
if not found or found == fence then
    forget()
end
"""
)

# For each session: nothing, or summary, fence, owner and whether that lives.
FIND = """
local lease, all = ARGV[1], {}
for index, session in ipairs(KEYS) do
    local found = redis.call('HMGET', session, 'summary', 'fence', 'owner')
    if found[1] then
        found[4] = redis.call('EXISTS', lease .. found[3])
        all[index] = found
    else
        all[index] = false
    end
end
return all
"""

"""What Redis does by itself, each script as one: no other command comes between its lines.

Under a prefix: `session:<member>` a hash of fence, owner, record, summary, used_s and size; `ids`, `parked` sorted
sets; `of:<owner>` sets; `sizes`, `bytes`, `owner_of` hashes; `parked_bytes` a counter; `lease:<owner>` keys with a time
to live. A member is `<tenant>\\0<session id>`. Totals are counted here, for to count takes a walk through all sessions.
"""

INDEX = """
local p, member, tenant = ARGV[1], ARGV[2], ARGV[3]
local key = p .. 'session:' .. member

-- Where the session stands in all indexes from now on; without an owner it is gone.
local function index(owner, used_s, size)
    local before = tonumber(redis.call('HGET', p .. 'sizes', member) or '0')
    local former = redis.call('HGET', p .. 'owner_of', member)
    if former and former ~= '' then redis.call('SREM', p .. 'of:' .. former, member) end
    if redis.call('ZREM', p .. 'parked', member) == 1 then
        redis.call('DECRBY', p .. 'parked_bytes', before)
    end
    redis.call('HINCRBY', p .. 'bytes', tenant, (owner and size or 0) - before)
    if not owner then
        redis.call('ZREM', p .. 'ids', member)
        redis.call('HDEL', p .. 'sizes', member)
        redis.call('HDEL', p .. 'owner_of', member)
        return
    end
    redis.call('ZADD', p .. 'ids', 0, member)
    redis.call('HSET', p .. 'sizes', member, size)
    redis.call('HSET', p .. 'owner_of', member, owner)
    if owner == '' then
        redis.call('ZADD', p .. 'parked', used_s, member)
        redis.call('INCRBY', p .. 'parked_bytes', size)
    else
        redis.call('SADD', p .. 'of:' .. owner, member)
        redis.call('SADD', p .. 'owners', owner)
    end
end
"""

# prefix, member, tenant, fence, owner, is_new, used_s, size, ttl_ms, summary, record, writer, number of the write. One
# that was given up may come late, behind a newer one of the same writer; then it changes nothing.
WRITE = (
    INDEX
    + """
local fence = redis.call('HGET', key, 'fence')
if fence and fence ~= ARGV[4] or not fence and ARGV[6] ~= '1' then return 0 end
local writer, number = unpack(redis.call('HMGET', key, 'writer', 'number'))
if writer == ARGV[12] and tonumber(number) > tonumber(ARGV[13]) then return 1 end
redis.call('HSET', key, 'fence', ARGV[4], 'owner', ARGV[5], 'used_s', ARGV[7], 'size', ARGV[8],
    'summary', ARGV[10], 'record', ARGV[11], 'writer', ARGV[12], 'number', ARGV[13])
if ARGV[5] == '' then redis.call('PEXPIRE', key, ARGV[9]) else redis.call('PERSIST', key) end
index(ARGV[5], ARGV[7], tonumber(ARGV[8]))
return 1
"""
)

# prefix, member, tenant, fence, owner
TAKE = (
    INDEX
    + """
local fence, owner, used_s, size = unpack(redis.call('HMGET', key, 'fence', 'owner', 'used_s', 'size'))
if fence ~= ARGV[4] then return false end
if owner ~= '' and owner ~= ARGV[5] and redis.call('EXISTS', p .. 'lease:' .. owner) == 1 then return false end
redis.call('HINCRBY', key, 'fence', 1)
redis.call('HSET', key, 'owner', ARGV[5])
redis.call('PERSIST', key)
index(ARGV[5], used_s, tonumber(size))
return redis.call('HMGET', key, 'record', 'fence', 'owner')
"""
)

# prefix, member, tenant, fence
ERASE = (
    INDEX
    + """
if redis.call('HGET', key, 'fence') ~= ARGV[4] then return 0 end
redis.call('UNLINK', key)
index(nil)
return 1
"""
)

# prefix, member, tenant: what has vanished by its time to live leaves the indexes, too
FORGET = (
    INDEX
    + """
if redis.call('EXISTS', key) == 0 then index(nil) end
"""
)

# prefix, owner, lease_ms
RENEW = """
local had_lived = redis.call('EXISTS', ARGV[1] .. 'lease:' .. ARGV[2])
redis.call('SET', ARGV[1] .. 'lease:' .. ARGV[2], '', 'PX', ARGV[3])
return had_lived
"""

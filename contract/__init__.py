"""The Headwater protocol, version 1. Where code and this text differ, the text is right.

It binds devices (agents, or anything that speaks like one) and gateways. Test vectors, from which another
implementation can be checked, are in `tests/contract/vectors/`.

The promise
-----------
A reading that a device's buffer accepted ends up in the lake exactly once, bit for bit. Only the buffer and the lake
own data; broker and gateway may lose everything at any moment. An acknowledgement means: committed in the lake.

Words
-----
*device*, *stream*  Names: `[a-z0-9][a-z0-9._-]{0,62}`. The device name is also its MQTT client id. Streams whose names begin
            with `headwater.` are reserved; an agent reports events in `headwater.events`.
*reading*   One row: `ts` and the stream's fields.
*batch*     Consecutive readings of one stream of one device: the unit of buffering, sending and acknowledging.
*epoch*     128 random bits, made with a device's buffer, and whenever the device can no longer be sure that its
            sequence continues (a new or restored buffer, a copied card), or when fresh data shall overtake a backlog.
*seq*       1, 2, 3, … for the batches of one (device, stream, epoch); at most 2^53 - 1. A number is never given twice.
*floor*     The lowest seq of (stream, epoch) that the device still holds.
*watermark* The highest seq of (device, stream, epoch) that is committed in the lake.
*shard*     `crc32(device) % 64` (CRC-32 of ISO 3309 over the name's ASCII bytes).

Topics
------
All begin with `hw/v1/`. MQTT 5 or 3.1.1.

===================================  ==========  ====  ========  ==================================================
topic                                from        QoS   retained  payload
===================================  ==========  ====  ========  ==================================================
`up/<shard>/<device>/<stream>`       device      1     no        one batch (below)
`ack/<device>`                       gateway     1     yes       `Ack`: `{"v":1,"committed":[{stream, epoch, seq}]}`
`rewind/<device>`                    gateway     0     no        `Rewind`: `{"v":1, stream, epoch, expected}`
`desired/<device>`                   gateway     1     yes       `Desired`: `{"v":1, revision, streams}`
`reported/<device>`                  device      1     yes       `Reported`
`assign/<device>`                    gateway     1     yes       `Assignments`: signed orders, see `contract.models`
`status/<device>`                    device      1     yes       `Presence`; also the last will
===================================  ==========  ====  ========  ==================================================

The JSON documents are the structs of `contract.messages`, member for member. Unknown members are ignored, except in
`Desired`, which is refused whole.

A batch on the wire
-------------------
::

    payload  = envelope-frame body
    envelope-frame = 50 2A 4D 18, length (u32, little endian), envelope        a zstd skippable frame (RFC 8878, 3.1.2)
    envelope = MessagePack array [version = 1, device, stream, epoch (bin 16), seq, floor, rows, sent_at_us,
                                  [synced (bool), wall_us, monotonic_us, boot (bin 16)], crc32]
    body     = one zstd frame, content size stated, around one Arrow IPC stream: schema, dictionaries if any,
               exactly one record batch, end of stream

The body is encoded once, when the batch is closed; the bytes in the buffer are the bytes on the wire. The envelope is
written at each sending, because `floor` and `sent_at_us` change between sendings. Any zstd tool skips the envelope:
`zstd -dc payload` yields the Arrow stream.

`rows` counts the rows of the body. `sent_at_us` and `wall_us` are the device's wall clock in microseconds since 1970-01-01
UTC. `synced, wall_us, monotonic_us, boot` describe the device's clocks when the batch was closed. `crc32` (ISO 3309) is
taken over the body followed by all bytes of the envelope before it, and written as uint 32 (CE and four bytes, big
endian): it tells damage on the way (send again) from a batch that was made wrong (quarantine).

Rules for the record batch:

1. `ts` is `timestamp[us, tz=UTC]`, never null, at any place among the fields. Beside it stands at least one field.
2. Field names have 1 to 128 bytes of UTF-8, no control characters, and differ by more than case. Names beginning with
   `_` and the name `date` are allowed; the lake stores them under another name and gives them back.
3. `_row` (int32) is reserved for thinned batches: of the original rows 0 … n-1 a full buffer kept some; `_row` has
   their original numbers, rising, beginning with 0 and ending with n-1, so that what is missing stays visible.
4. Types: null, bool, all integers, float16/32/64, decimals, string and binary (also large and fixed size), date,
   time, timestamp and duration in every unit, list, large list, fixed-size list, struct, map, and dictionaries of
   plain values other than null. Not: unions, views, run-end encoding, month-day-nano intervals, extension types,
   nesting deeper than 8.
5. Arrow buffers are not compressed one by one. Values are valid (UTF-8 in strings and in names of time zones, offsets in
   order).
6. Limits (`contract.limits`): payload 8 MiB, body 64 MiB unpacked (dictionaries expanded), 65,536 rows, 1,024 fields,
   envelope 1 KiB.

What a device does
------------------
* It gives a batch its seq and stores it durably in one step, before it sends it. Reading a stored batch never deletes
  it.
* Per (stream, epoch) it sends stored batches in rising seq, at most a window (count and bytes) unacknowledged. PUBACK
  from the broker means nothing. It does not send across a hole in its seqs until everything below the hole is gone
  from the buffer: then the batch after the hole is its floor.
* On an ack of (stream, epoch, seq) it deletes all batches up to seq. It ignores an ack of an epoch it does not have.
  Until the first ack of a (stream, epoch) since it started it sends one batch only. An ack beyond what it sent since
  it started, and beyond what its buffer had assigned when it started, shows that the buffer went back in time (a
  restored card): it moves the batches stored since it started to a new epoch, and believes the ack for the rest.
  An epoch that it finds in its buffer at start, with nothing left to send in it, it continues only if a retained ack
  shows that the lake has all of it; otherwise it opens a new epoch: nobody else could tell that the buffer is old.
* On a rewind to `expected`, and when no ack came for `ack_timeout`, it sends again from its lowest held seq ≥
  `expected` (or from its floor). Timeouts back off with jitter while nothing is acknowledged.
* Evicting gives up batches without sending; their seqs are not used again, so a hole remains: the gap in the lake.
* When the backlog passes a limit it may open a new epoch for fresh data and drain the old one beside it.

What a gateway does
-------------------
Per (device, stream, epoch): `committed`, the watermark in the lake, 0 if none; `expected = committed + 1 + pending`.

* `seq == expected`: admit. `seq < expected`: drop, and acknowledge `committed` again. `seq > expected`: drop, and ask
  for a rewind to `expected`; but if `seq == floor`, the batches between do not exist any more: admit, and go on from
  there.
* Topic and envelope must name the same device and stream. What breaks a rule goes whole to quarantine with its
  reason. If the body's checksum is right, sending again cannot help: the seq is stepped over with the next commit,
  and acknowledged. If not, it is not stepped over.
* One Delta commit per stream table holds the rows, the new watermark of every (device, epoch) in it as application
  transaction `device/epoch`, and for every shard in it a counter, one higher than before, as application transaction
  `shard/NN`.
* Before the commit, on the same handle: refresh. Where a shard's counter is not what this gateway last saw, another one
  committed: read the watermarks of that shard's (device, epoch)s again and keep only what continues from them
  without a hole by the rules above. Refused, timed out, outcome unknown: the same path again.
* Acks are published only after the commit. When it cannot commit, it drops what it cannot hold, and stays silent.
"""

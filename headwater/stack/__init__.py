"""The one-machine stack: an embedded broker and object store, and the supervision of every process.

Modules, from the ground up: `errors`; `ports` (which port, remembered); `folder` (the data folder and its lock);
`lifecycle` (what to do with one child, pure); `logs` (bounded log files); `launch` and `spawn` (a child that dies with
its parent); `supervisor` (the thread that owns all children); `probes` (does a server really answer); `broker` and
`objectstore` (the servers themselves). Why these servers and what they cost: docs/adr/0004-embedded-servers.md.
"""

"""The fault injector of the tests: a network, an object store and processes that misbehave on command.

`proxy` stands between a client and a server and spoils the connection; `store` does the same for S3 and knows requests;
`http` is the little of HTTP that it needs; `processes` kills and freezes by a schedule that a seed replays.
"""

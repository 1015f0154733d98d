"""An OpenAI-compatible server, each request a fork of one memory.

A fork is discarded with its request: no client sees another's text, and the memory stays as loaded.

`protocol.py` validates requests, `app.py` answers over HTTP, `worker.py` shares one model among requests, and
`answer.py` generates one answer, token by token.
"""

"""An OpenAI-compatible server, each request a fork of one memory.

What a request says is forgotten with it: no client sees another's text, and the memory stays as it was loaded.

`protocol.py` checks what clients ask, `app.py` answers over HTTP, `worker.py` shares one model among requests, and
`answer.py` makes one answer, token by token.
"""

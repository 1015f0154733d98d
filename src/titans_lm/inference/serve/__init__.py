"""An OpenAI-compatible server, each request a fork of one memory.

A fork is discarded with its request: no client sees another's text, and the memory stays as loaded.

`protocol.py` validates requests, `app.py` answers over HTTP, `worker.py` runs the engine in a thread. `engine.py`
decides which answers the model advances, `batch.py` advances them in one call, and `answer.py` is one answer, token by
token: these three know nothing of HTTP.
"""

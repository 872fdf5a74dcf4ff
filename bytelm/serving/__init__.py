"""An OpenAI-compatible API over HTTP: requests, the batch that they share, answers, the server.

Nothing here knows a framework: a model is an `engine.Engine`.
"""

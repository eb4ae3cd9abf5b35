"""The wire format between a client and a teacher server: messages, score rows and errors.

It imports no torch, no vllm, no ray and no HTTP library.
"""

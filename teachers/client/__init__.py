"""The client side of teachers: TeacherPool distributes score requests over the replicas of each teacher.

It imports no torch, transformers, vllm, ray or FastAPI, so that a trainer starts without them.
"""

"""Teacher models: score token sequences on a server and fetch the scores from a client.

protocol    messages, Arrow format of the scores and errors; shared by client and server
client      TeacherPool: load balancing over replicas, retries, hedging; imports no torch, vllm, ray or FastAPI
server      HTTP service, limits, metrics, vLLM plugin, Ray Serve application
engines     the libraries that run a model: transformers, vLLM
"""

"""The server side of teachers: one engine behind limits, as an HTTP server, vLLM plugin or Ray Serve application."""

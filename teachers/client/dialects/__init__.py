"""Dialects: the protocols in which a client talks to a teacher server. One file per dialect.

DIALECTS is the registry, in the order in which the dialects are tried for a new address. A new dialect is one file with
a class that implements `base.Dialect`, and one line here. The objects are resolved when they are needed.
"""

DIALECTS = {
    "native": "teachers.client.dialects.native:NativeDialect",
    "sglang": "teachers.client.dialects.sglang:SglangDialect",
    "vllm_openai": "teachers.client.dialects.vllm_openai:VllmOpenAIDialect",
    "openai_echo": "teachers.client.dialects.openai_echo:OpenAIEchoDialect",
    "ray_handle": "teachers.client.dialects.ray_handle:RayHandleDialect",
}

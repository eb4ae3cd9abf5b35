"""Connect the routes of a rollout server with the engine of the vLLM server that they are part of."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from teachers.server.rollouts import Weights

NUM_ADAPTERS = 2  # under whose names new texts may be requested; texts in flight end with the adapter they began with


def set_engine(weights: Weights, engine_client: Any, state: Any) -> None:
    """Set the functions that load weights, and adapters if the server was started with --enable-lora."""
    config = engine_client.vllm_config
    weights.model = Path(config.model_config.model)
    weights.call = lambda method, *arguments: engine_client.collective_rpc(method, args=arguments)
    if config.lora_config is None:
        return
    models, names = state.openai_serving_models, list[str]()

    async def load_adapter(name: str, folder: str) -> str | None:
        """Load an adapter, and forget the names of older ones."""
        request = SimpleNamespace(lora_name=name, lora_path=folder, load_inplace=False, is_3d_lora_weight=False)
        result = await models.load_lora_adapter(request)
        if not isinstance(result, str):
            return str(result.error.message)
        names.append(name)
        while len(names) > NUM_ADAPTERS:
            await models.unload_lora_adapter(SimpleNamespace(lora_name=names.pop(0), lora_int_id=None))
        return None

    weights.load_adapter = load_adapter
